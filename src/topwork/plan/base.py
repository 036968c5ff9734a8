"""The structure of the base that a recipe names, from its config alone."""

from collections.abc import Callable

from topwork.models.config import ModelConfig
from topwork.models.config_files import find_config
from topwork.models.structure import Structure
from topwork.models.structures.build import structure_from


def structure_named(model: ModelConfig, log: Callable[[str], None] = lambda _: None) -> Structure:
    """Without torch where the family stands in `models/structures/`; else from its skeleton, which takes some seconds
    and is told. Raises ModelError."""
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

    return structure_of(base_skeleton(model), fast=False)
