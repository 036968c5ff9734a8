"""A recipe whose base gets new tokens (`model.new_tokens`): its adapter trains their rows. Free of torch."""

from collections.abc import Sequence
from typing import TypeVar

from topwork.adapters.config import AdapterConfig, FullConfig, LoraConfig
from topwork.adapters.methods.lora.token_places import with_tokens
from topwork.adapters.places import Places
from topwork.common.errors import RequestError
from topwork.models.structure import Structure
from topwork.models.vocabulary import planned_growth
from topwork.plan.base import stored_rows
from topwork.recipe.recipe import Recipe

Config = TypeVar("Config", bound=AdapterConfig)


def with_planned_tokens(recipe: Recipe, structure: Structure) -> Recipe:
    """The recipe as it will train, by the tokenizer's files alone; where these are not on this machine, with as many
    rows as it names tokens."""
    growth = planned_growth(recipe.model, stored_rows(recipe.model)) if recipe.model.grows else None
    return recipe if growth is None else with_token_rows(recipe, structure, growth.fresh)


def with_token_rows(recipe: Recipe, base: Places, ids: Sequence[int]) -> Recipe:
    """The recipe with an adapter that trains these tokens' rows, too. Raises RequestError where it cannot."""
    adapter = training_rows(recipe.adapter, base, ids)
    return recipe if adapter is recipe.adapter else recipe.model_copy(update={"adapter": adapter})


def training_rows(config: Config, base: Places, ids: Sequence[int]) -> Config:
    """An adapter's options with these tokens' rows in embedding and head among what it trains."""
    if not ids or isinstance(config, FullConfig):
        return config
    if isinstance(config, LoraConfig):
        named = with_tokens(base, config.trainable_token_indices, ids, config.saved_modules)
        same = named == config.trainable_token_indices
        return config if same else config.model_copy(update={"trainable_token_indices": named})
    ends = [path for path in (base.embedding, None if base.tied else base.head) if path is not None]
    left = [path for path in ends if not path.endswith(tuple(config.saved_modules) or ("\0",))]
    if left:
        raise RequestError(
            f"model.new_tokens is set, and method {config.method} trains no rows of {' and '.join(left)}: those of new "
            "tokens would stay as they begin; take method lora, which trains them, or one with modules_to_save: "
            f"[{', '.join(path.rpartition('.')[2] for path in left)}]"
        )
    return config
