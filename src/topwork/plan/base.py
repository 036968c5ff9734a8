"""The structure of the base that a recipe names, from its config alone."""

from topwork.models.config import ModelConfig
from topwork.models.structure import Structure


def structure_named(model: ModelConfig) -> Structure:
    """Without torch where the family stands in `models/structures/`; else from its skeleton. Raises ModelError."""
    from topwork.models.structure_of import structure_of
    from topwork.plan.count import base_skeleton

    bare = base_skeleton(model)
    return structure_of(bare, fast=bare.config.get_text_config().model_type in ("llama", "mistral", "qwen2", "qwen3"))
