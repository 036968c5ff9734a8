"""What planning memory needs to know of recipes that train together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from topwork.adapters.sizes import tensor_sizes
from topwork.common.errors import ModelError
from topwork.models.structure import Structure
from topwork.plan.base import quantization_named
from topwork.quantization.config import QuantizationConfig
from topwork.recipe.recipe import Recipe
from topwork.training.memory_setup import Member, Setup


def setup_of(recipes: Sequence[Recipe], structure: Structure, device: Literal["cpu", "cuda"] = "cpu") -> Setup:
    """Of recipes that share a base. Raises AdapterError where an adapter does not fit it."""
    first = recipes[0]
    dtype = structure.dtype if first.model.dtype == "auto" else first.model.dtype
    members = tuple(
        Member(recipe.adapter, recipe.training.optim, tensor_sizes(structure, recipe.adapter)) for recipe in recipes
    )
    file = Path(first.model.model_name_or_path) / "tokenizer.json"
    size = file.stat().st_size if file.is_file() else None
    return Setup(structure, dtype, _held(first), members, device, tokenizer_bytes=size)


def _held(recipe: Recipe) -> QuantizationConfig:
    """As the recipe says, or as the base is stored; where nothing tells that, its loading will."""
    try:
        return quantization_named(recipe.model, recipe.quantization)
    except ModelError:
        return recipe.quantization
