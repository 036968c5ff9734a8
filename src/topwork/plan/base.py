"""The structure of the base that a recipe names, from its config alone."""

from collections.abc import Callable
from typing import Any

from topwork.models.config import ModelConfig
from topwork.models.config_files import find_config
from topwork.models.structure import Structure
from topwork.models.structures.build import structure_from
from topwork.models.vocabulary import grown, planned_growth, rows_of
from topwork.quantization.config import QuantizationConfig


def structure_named(model: ModelConfig, log: Callable[[str], None] = lambda _: None) -> Structure:
    """Without torch where the family stands in `models/structures/`; else from its skeleton, which takes some seconds
    and is told; with rows for the tokens that are new. Raises ModelError."""
    structure = _stored(model, log)
    growth = planned_growth(model, rows_of(structure))
    return structure if growth is None else grown(structure, growth.rows)


def stored_rows(model: ModelConfig) -> int:
    """How many rows its embedding has, without new tokens. Raises ModelError."""
    return rows_of(_stored(model, lambda _: None))


def _stored(model: ModelConfig, log: Callable[[str], None]) -> Structure:
    """As its weights are."""
    found = find_config(model.model_name_or_path, model.revision)
    values = found.values()
    structure = None if model.trust_remote_code and "auto_map" in values else structure_from(values)
    if structure is not None:
        return structure
    log(
        f"{values.get('model_type', found.name)}: a config alone does not tell its modules, so transformers builds them"
    )
    from topwork.models.structure_of import structure_of
    from topwork.plan.built import base_skeleton

    return structure_of(base_skeleton(model, grown=False), fast=False)


def quantization_named(model: ModelConfig, wanted: QuantizationConfig) -> QuantizationConfig:
    """How a base is held: as it is `wanted`, or as its config says that it is stored, by bitsandbytes. Raises
    ModelError."""
    stored = find_config(model.model_name_or_path, model.revision).values().get("quantization_config")
    if wanted.active or not isinstance(stored, dict):
        return wanted
    skipped = stored.get("llm_int8_skip_modules")
    asked = {"llm_int8_skip_modules": skipped} if isinstance(skipped, list) else {}
    if stored.get("load_in_8bit"):
        return _checked({"load_in_8bit": True, **asked}, wanted)
    if not stored.get("load_in_4bit"):
        return wanted
    names = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    return _checked({"load_in_4bit": True, **{name: stored[name] for name in names if name in stored}, **asked}, wanted)


def _checked(asked: dict[str, Any], otherwise: QuantizationConfig) -> QuantizationConfig:
    """A config that says what cannot be is for its loading to speak of."""
    try:
        return QuantizationConfig.model_validate(asked)
    except ValueError:
        return otherwise
