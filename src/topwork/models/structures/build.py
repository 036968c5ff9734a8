"""A base's structure from its config alone, in a blink: no torch, no transformers."""

from collections.abc import Mapping
from typing import Any

from topwork.common.errors import ModelError
from topwork.models.structure import Structure
from topwork.models.structures.parts import Node, block, layers_in, modules_of
from topwork.models.structures.table import FAMILIES, TEXT_PARTS, WRAPPERS, Family, Wrapper
from topwork.models.structures.values import Values, widths

FAST_ACTIVATIONS = frozenset({
    "silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate",
})  # fmt: skip
"""As configs call what `models/fast.py` computes."""
TEXT_PART = "model.language_model"
"""Where the text part of a model that reads pictures too stands."""
BESIDE = ("quantization_config", "dtype", "torch_dtype")


def structure_from(config: Mapping[str, Any]) -> Structure | None:
    """Of a config.json's values; None where its family, or what it says of it, stands in no table. Raises ModelError
    for sizes that are missing or none."""
    name = str(config.get("model_type"))
    if name in WRAPPERS:
        return _of_wrapper(config, WRAPPERS[name])
    family = FAMILIES.get(name)
    if family is None:
        return None
    values = Values(name, config, family.defaults)
    if _is_other(values, family):
        return None
    values.check_stated()
    root = family.layout(values)
    return _structure(values, family, root, layers_in(root))


def _of_wrapper(config: Mapping[str, Any], wrapper: Wrapper) -> Structure | None:
    """Of a model that reads pictures too."""
    own = _text_config(config, wrapper)
    name = str(own.get("model_type") or wrapper.text) if wrapper.any_text else wrapper.text
    family = FAMILIES.get(name) or TEXT_PARTS.get(name)
    if family is None or family.embedding != "model.embed_tokens":
        return None
    known = wrapper.defaults if name == wrapper.text else {}
    values = Values(name, own | {"tie_word_embeddings": _tied(config, own, wrapper)}, {**family.defaults, **known})
    if _is_other(values, family) or (name != wrapper.text and values.unstated):
        return None
    values.check_stated()
    beside = wrapper.beside(config, values)
    if beside is None:
        return None
    inside = family.layout(values).inside
    root = block(model=block(**beside, language_model=inside["model"]), lm_head=inside["lm_head"])
    return _structure(values, family, root, layers_in(inside["model"]), TEXT_PART)


def _structure(values: Values, family: Family, root: Node, checkpointable: int, text: str = "") -> Structure:
    activation = values.get("hidden_activation", "hidden_act")
    return Structure(
        **widths(values),
        modules=modules_of(root, family.head if values.tied else None),
        embedding=f"{text}.embed_tokens" if text else family.embedding,
        head=family.head,
        fast=family.fast and activation in FAST_ACTIVATIONS,
        checkpointable=checkpointable,
        config={**values.defaults, **values.given},
        text=text,
    )


def _is_other(values: Values, family: Family) -> bool:
    """Whether it is laid out otherwise than the table has it."""
    return any(values.get(key) not in (None, value) for key, value in family.only.items())


def _text_config(config: Mapping[str, Any], wrapper: Wrapper) -> dict[str, Any]:
    """What the config says of its text part; how the whole is held may stand beside it. Raises ModelError."""
    given = config.get("text_config")
    if isinstance(given, dict):
        return {key: config[key] for key in BESIDE if key in config} | given
    if wrapper.flat:
        return {key: value for key, value in config.items() if key != "model_type"}
    raise ModelError(
        f"the config of this {config['model_type']!r} model says nothing of text_config, which has its sizes"
    )


def _tied(config: Mapping[str, Any], text: Mapping[str, Any], wrapper: Wrapper) -> bool:
    """Whether the head's weight is the embedding's."""
    said = config.get("tie_word_embeddings")
    if wrapper.ties is None:
        return bool(said or text.get("tie_word_embeddings"))
    return wrapper.ties if said is None else bool(said)
