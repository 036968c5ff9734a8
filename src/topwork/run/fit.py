"""What fits into memory beside the base: how many adapters, how large a pass, how many layers run again."""

from collections.abc import Callable, Sequence

import torch

from topwork.common.errors import ModelError, RequestError
from topwork.common.memory import Free, free_memory
from topwork.models.base import Base
from topwork.models.checkpointing import decoder_layers
from topwork.models.load import pick_device
from topwork.models.recognise import is_fast
from topwork.plan.built import base_skeleton, count_built
from topwork.plan.count import ParameterCount
from topwork.plan.footprint import held_bytes
from topwork.recipe.recipe import Recipe
from topwork.run.session import Session
from topwork.training.passes import SMALLEST_PASS, Memory, PassPlan, plan_passes, trial_bytes
from topwork.training.passes import trials_that_fit as fitting

PROCESS_BYTES = 192 << 20
"""What a process on a CPU takes beside weights, passes, gradients and optimizers once it trains: compiled kernels, its
threads' heaps, chunks of logits, checkpoints on their way to the disk (benchmarks/container_memory.py)."""


def trials_that_fit(on: Session, recipes: Sequence[Recipe]) -> int:
    """How many of the first recipes' adapters fit into free memory together with a pass; at least 1."""
    training = recipes[0].training
    memory = _memory(on.base, recipes, free_memory(on.base.device).bytes)
    needed = [_needed_bytes(recipe, count_built(on.base.module, recipe.adapter)) for recipe in recipes]
    return fitting(needed, training.tokens_per_pass, training.activation_checkpointing, memory)


def passes_that_fit(
    recipes: Sequence[Recipe], counted: Sequence[ParameterCount], longest: int, asked: int | None, base: Base,
    log: Callable[[str], None],
) -> PassPlan:  # fmt: skip
    """Tokens per pass, as asked or from free memory, and the layers that are checkpointed; `longest` has to fit.

    `asked` is the recipe's, or that of the run which goes on: the latter is left where it does not fit any more. Raises
    RequestError where no pass fits that nobody asked for.
    """
    checkpointing = recipes[0].training.activation_checkpointing
    # half of free memory is planned with, and one adapter's gradients and optimizer are of the other half
    others = sum(map(_needed_bytes, recipes[1:], counted[1:]))
    free = free_memory(base.device)
    memory = _memory(base, recipes, free.bytes - others, _needed_bytes(recipes[0], counted[0]))
    kept = asked != recipes[0].training.tokens_per_pass  # memory may have made it smaller than the longest
    plan = plan_passes(asked, checkpointing, 0 if kept else longest, memory)
    needed = memory.needed_bytes(plan.tokens_per_pass, plan.checkpointed_layers)
    if memory.beside_bytes and needed > memory.free_bytes:
        taken = _takes(plan, needed + others)
        if asked is not None and kept:
            log(f"{taken}, and {_told(free)} are free: the run goes on with fewer, to the same result")
            return passes_that_fit(recipes, counted, longest, None, base, log)
        _too_little(recipes[0], f"{taken} beside the base, and {_told(free)} are free", log)
    _tell(plan, memory, asked, checkpointing == "auto", free, log)
    return plan


def _takes(plan: PassPlan, needed: int) -> str:
    return f"training with {plan.tokens_per_pass:,} tokens per pass takes about {needed / 10**6:,.0f} MB"


def _too_little(recipe: Recipe, told: str, log: Callable[[str], None]) -> None:
    """A size that was asked for is tried. Raises RequestError where it was not."""
    if recipe.training.tokens_per_pass is None:
        raise RequestError(f"{told}. {_less(recipe)}. {_TRIED}")
    log(
        f"warning: {told}; the run may be ended for want of memory. A smaller training.tokens_per_pass, or none, "
        "leaves the result as it is"
    )


def refuse_small_memory(recipe: Recipe, longest: int = SMALLEST_PASS) -> None:
    """Before any weight is read. Raises RequestError where base, adapter and the smallest pass are more than what is
    free in the memory of a CPU, or the base alone where the recipe names the size of a pass, which is then tried; a
    base that cannot be built without its weights is for its loading to speak of."""
    training, cpu = recipe.training, torch.device("cpu")
    if pick_device(recipe.model.device).type != "cpu":
        return
    try:
        bare = base_skeleton(recipe.model)
    except ModelError:
        return
    weights = held_bytes(bare, recipe.model.dtype, recipe.quantization)
    beside = PROCESS_BYTES + _needed_bytes(recipe, count_built(bare, recipe.adapter))
    layers = 0 if training.activation_checkpointing == "off" else len(decoder_layers(bare))
    beside = Memory(bare.config, cpu, 0, beside_bytes=beside).needed_bytes(min(SMALLEST_PASS, longest), layers)
    needed, free = weights + (beside if training.tokens_per_pass is None else 0), free_memory(cpu)
    if needed > free.bytes:
        raise RequestError(
            f"training takes at least {needed / 10**6:,.0f} MB, {weights / 10**6:,.0f} of them the base's weights, and "
            f"{_told(free)} are free. {_less(recipe)}" + (f". {_TRIED}" if weights <= free.bytes else "")
        )


_TRIED = "A training.tokens_per_pass that the recipe names is tried"


def _less(recipe: Recipe) -> str:
    """What would fit."""
    packed = "" if recipe.quantization.active else "quantization.load_in_4bit: true, "
    return f"Give more memory, or lower what is needed: {packed}a smaller base, adapter.r or data.max_length"


def _told(free: Free) -> str:
    of = f" of {free.source}" if free.limited else ""
    return f"{free.bytes / 10**6:,.0f} MB{of}"


def _tell(
    plan: PassPlan, memory: Memory, asked: int | None, auto: bool, free: Free, log: Callable[[str], None]
) -> None:
    if asked is None:
        log(
            f"tokens per pass: {plan.tokens_per_pass:,}, from {free.source}; set training.tokens_per_pass to repeat a "
            "run to the bit"
        )
    if plan.checkpointed_layers:
        why = f", from {free.source}" if auto else ""
        log(f"activation checkpointing: {plan.checkpointed_layers} of {memory.checkpointable_layers} layers{why}")


def _memory(base: Base, recipes: Sequence[Recipe], free_bytes: int, trial: int = 0) -> Memory:
    """`trial` is what the first adapter will still take."""
    dropout = any(recipe.adapter.dropout > 0 for recipe in recipes)
    plain = any(recipe.adapter.runs_plain for recipe in recipes)
    layers = len(decoder_layers(base.module))
    beside = PROCESS_BYTES + trial if base.device.type == "cpu" else 0
    fast = is_fast(base.module) and not plain
    return Memory(base.module.config, base.device, free_bytes, layers, dropout, fast, beside)


def _needed_bytes(recipe: Recipe, counted: ParameterCount) -> int:
    """PiSSA and OLoRA also hold what they began with, in fp32."""
    sizes = [part.trainable for part in counted.by_module]
    beginnings = 4 * sum(sizes) if recipe.adapter.keeps_beginnings else 0
    return trial_bytes(recipe.training, sizes) + beginnings
