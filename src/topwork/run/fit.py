"""What fits into memory beside the base: how many adapters, how large a pass, how many layers run again."""

from collections.abc import Callable, Sequence

from topwork.common.devices import free_memory_bytes
from topwork.models.base import Base
from topwork.models.checkpointing import decoder_layers
from topwork.models.recognise import is_fast
from topwork.plan.count import ParameterCount, count_adapter
from topwork.recipe.recipe import Recipe
from topwork.run.session import Session
from topwork.training.passes import Memory, PassPlan, plan_passes, trial_bytes
from topwork.training.passes import trials_that_fit as fitting


def trials_that_fit(on: Session, recipes: Sequence[Recipe]) -> int:
    """How many of the first recipes' adapters fit into free memory together with a pass; at least 1."""
    training = recipes[0].training
    memory = _memory(on.base, recipes, free_memory_bytes(on.base.device))
    needed = [_needed_bytes(recipe, count_adapter(on.base.module, recipe.adapter)) for recipe in recipes]
    return fitting(needed, training.tokens_per_pass, training.activation_checkpointing, memory)


def passes_that_fit(
    recipes: Sequence[Recipe], counted: Sequence[ParameterCount], longest: int, asked: int | None, base: Base,
    log: Callable[[str], None],
) -> PassPlan:  # fmt: skip
    """Tokens per pass, as asked or from free memory, and the layers that are checkpointed; `longest` has to fit."""
    checkpointing = recipes[0].training.activation_checkpointing
    # half of free memory is planned with, and one adapter's gradients and optimizer are of the other half
    others = sum(map(_needed_bytes, recipes[1:], counted[1:]))
    memory = _memory(base, recipes, free_memory_bytes(base.device) - others)
    plan = plan_passes(asked, checkpointing, longest, memory)
    if asked is None:
        log(
            f"tokens per pass: {plan.tokens_per_pass:,}, from free memory; set training.tokens_per_pass to repeat a "
            "run to the bit"
        )
    if plan.checkpointed_layers:
        why = ", from free memory" if checkpointing == "auto" else ""
        log(f"activation checkpointing: {plan.checkpointed_layers} of {memory.checkpointable_layers} layers{why}")
    return plan


def _memory(base: Base, recipes: Sequence[Recipe], free_bytes: int) -> Memory:
    dropout = any(recipe.adapter.dropout > 0 for recipe in recipes)
    plain = any(recipe.adapter.runs_plain for recipe in recipes)
    layers = len(decoder_layers(base.module))
    return Memory(base.module.config, base.device, free_bytes, layers, dropout, is_fast(base.module) and not plain)


def _needed_bytes(recipe: Recipe, counted: ParameterCount) -> int:
    """PiSSA and OLoRA also hold what they began with, in fp32."""
    sizes = [part.trainable for part in counted.by_module]
    beginnings = 4 * sum(sizes) if recipe.adapter.keeps_beginnings else 0
    return trial_bytes(recipe.training, sizes) + beginnings
