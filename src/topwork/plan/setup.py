"""What planning memory needs to know of recipes that train together."""

from collections.abc import Sequence
from typing import Literal

from topwork.adapters.sizes import tensor_sizes
from topwork.models.structure import Structure
from topwork.recipe.recipe import Recipe
from topwork.training.memory_setup import Member, Setup


def setup_of(recipes: Sequence[Recipe], structure: Structure, device: Literal["cpu", "cuda"] = "cpu") -> Setup:
    """Of recipes that share a base. Raises AdapterError where an adapter does not fit it."""
    first = recipes[0]
    dtype = structure.dtype if first.model.dtype == "auto" else first.model.dtype
    members = tuple(
        Member(recipe.adapter, recipe.training.optim, tensor_sizes(structure, recipe.adapter)) for recipe in recipes
    )
    return Setup(structure, dtype, first.quantization, members, device)
