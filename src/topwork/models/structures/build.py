"""A base's structure from its config alone, in a blink: no torch, no transformers."""

from collections.abc import Mapping
from typing import Any

from topwork.common.errors import ModelError
from topwork.models.structure import Structure
from topwork.models.structures.parts import layers_in, modules_of
from topwork.models.structures.table import FAMILIES, Family
from topwork.models.structures.values import Values, widths

FAST_ACTIVATIONS = frozenset({
    "silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate",
})  # fmt: skip
"""As configs call what `models/fast.py` computes."""


def structure_from(config: Mapping[str, Any]) -> Structure | None:
    """Of a config.json's values; None where its family, or what it says of it, stands in no table. Raises ModelError
    for sizes that are missing or none."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return None
    values = _values(config, family)
    if any(values.get(key) not in (None, value) for key, value in family.only.items()):
        return None
    values.check_stated()
    activation, root = values.get("hidden_activation", "hidden_act"), family.layout(values)
    return Structure(
        **widths(values),
        modules=modules_of(root, family.head if values.tied else None),
        embedding=family.embedding,
        head=family.head,
        fast=family.fast and activation in FAST_ACTIVATIONS,
        checkpointable=layers_in(root),
        config={**family.defaults, **values.given},
    )


def _values(config: Mapping[str, Any], family: Family) -> Values:
    """The config's own, or those of its text part, which then has the others beside it."""
    name = str(config["model_type"])
    if family.text is None:
        return Values(name, config, family.defaults)
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ModelError(f"the config of this {name!r} model says nothing of text_config, which has its sizes")
    beside = {
        key: config[key] for key in ("vision_config", "tie_word_embeddings", "quantization_config") if key in config
    }
    return Values(family.text, {**text, **beside}, family.defaults)
