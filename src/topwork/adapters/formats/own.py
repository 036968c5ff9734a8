"""Folders of the methods that PEFT has no form for: BitFit and full fine-tuning.

`adapter_model.safetensors` holds the tensors by the names that they have in the Hugging Face model, so those of a full
fine-tuning load as a state dict with `strict=False`; a head tied to the embedding is not repeated.
`adapter_config.json` says `"peft_type": null` and the method as `topwork_method`.
"""

from collections.abc import Mapping
from typing import Any

from topwork.adapters.config import OPTIONS_OF
from topwork.adapters.formats.format import Format
from topwork.adapters.graft import Adapters


def _format(method: str) -> Format:
    def keys(adapters: Adapters, name: str) -> dict[str, Any]:
        config = adapters.configs[name]
        own = {key: getattr(config, key) for key in sorted(OPTIONS_OF[method])}
        return {"peft_type": None, "topwork_method": method, "task_type": "CAUSAL_LM", **own}

    def options(raw: Mapping[str, Any], folder: str) -> dict[str, Any]:  # noqa: ARG001
        given = {key: raw[key] for key in OPTIONS_OF[method] if raw.get(key) is not None}
        return {"method": method, **given}

    return Format(None, keys, options, to_file=dict, from_file=dict)


BITFIT, FULL = _format("bitfit"), _format("full")
