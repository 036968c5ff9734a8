"""PEFT's PREFIX_TUNING and PROMPT_TUNING folders: one tensor `prompt_embeddings`, which PEFT names without a path
(`Adapters.load` finds its place).

How a prompt began from a text is not written: PEFT would look for a tokenizer by name to begin with it once more.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from topwork.adapters.formats.format import Format, peft_keys
from topwork.adapters.graft import Adapters
from topwork.adapters.virtual import Prefix
from topwork.common.errors import AdapterError

STARTS = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB"}


def _to_file(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.rpartition(".")[2]: tensor for key, tensor in stored.items()}


def _shared(adapters: Adapters, name: str, peft_type: str) -> dict[str, Any]:
    config = adapters.model.config.get_text_config()
    return {
        **peft_keys(peft_type),
        "modules_to_save": None,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": adapters.configs[name].num_virtual_tokens,
        "token_dim": next(iter(adapters.stored(name).values())).shape[1],
    }


def _prefix_keys(adapters: Adapters, name: str) -> dict[str, Any]:
    shape = next(part.shape for part in adapters.parts(name).values() if isinstance(part, Prefix))
    width = shape.heads * shape.size
    return {
        **_shared(adapters, name, "PREFIX_TUNING"),
        "num_attention_heads": shape.heads,  # of keys and values
        "token_dim": width,
        "encoder_hidden_size": width,
        "init_weights": None,
        "prefix_projection": False,
    }


def _prompt_keys(adapters: Adapters, name: str) -> dict[str, Any]:
    return {
        **_shared(adapters, name, "PROMPT_TUNING"),
        "prompt_tuning_init": STARTS.get(adapters.configs[name].prompt_tuning_init, "RANDOM"),
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }


def _options(method: str) -> Callable[[Mapping[str, Any], str], dict[str, Any]]:
    def options(raw: Mapping[str, Any], folder: str) -> dict[str, Any]:
        if raw.get("modules_to_save") or (raw.get("num_transformer_submodules") or 1) != 1:
            raise AdapterError(
                f"{folder} has modules_to_save or num_transformer_submodules beside its virtual tokens, which cannot "
                "be read; a decoder's virtual tokens alone can"
            )
        return {"method": method, "num_virtual_tokens": raw.get("num_virtual_tokens")}

    return options


PREFIX_TUNING = Format("PREFIX_TUNING", _prefix_keys, _options("prefix"), _to_file, dict)
PROMPT_TUNING = Format("PROMPT_TUNING", _prompt_keys, _options("prompt"), _to_file, dict)
