"""A base's structure from its config alone, in a blink: no torch, no transformers."""

from collections.abc import Mapping
from typing import Any

from topwork.models.structure import Structure
from topwork.models.structures.parts import modules_of
from topwork.models.structures.table import FAMILIES
from topwork.models.structures.values import Values, widths

FAST_ACTIVATIONS = frozenset({
    "silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate",
})  # fmt: skip
"""As configs call what `models/fast.py` computes."""


def structure_from(config: Mapping[str, Any]) -> Structure | None:
    """Of a config.json's values; None where its family, or what it says of it, stands in no table. Raises ModelError
    for sizes that are missing or none."""
    family = FAMILIES.get(str(config.get("model_type")))
    values = Values(str(config.get("model_type")), config, family.defaults if family else {})
    if family is None or any(values.get(key) not in (None, value) for key, value in family.only.items()):
        return None
    values.check_stated()
    activation = values.get("hidden_activation", "hidden_act")
    return Structure(
        **widths(values),
        modules=modules_of(family.layout(values), family.head if values.tied else None),
        embedding=family.embedding,
        head=family.head,
        fast=family.fast and activation in FAST_ACTIVATIONS,
        checkpointable=values.layers,
        config={**family.defaults, **config},
    )
