"""What fits into memory beside the base: how many adapters, how large a pass, how many layers run again. Planned by the
one model of memory there is (`training/memory.py`), which takes from this process what it has taken already."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Literal

import torch

from topwork.common.errors import ModelError
from topwork.common.memory import Free, free_memory, taken_memory
from topwork.models.base import Base
from topwork.models.checkpointing import decoder_layers
from topwork.models.load import pick_device
from topwork.models.recognise import is_fast
from topwork.models.structure import Structure
from topwork.plan.base import structure_named
from topwork.plan.fits import Job
from topwork.plan.setup import setup_of
from topwork.recipe.recipe import Recipe
from topwork.run.loading import refuse, usable
from topwork.run.loading import told as free_told
from topwork.run.planning.first import would_fit
from topwork.run.planning.place import gigabytes
from topwork.run.session import Session
from topwork.training.memory import MARGIN, SMALLEST_PASS, Setup, moments
from topwork.training.memory_held import adapter_bytes, base_bytes
from topwork.training.memory_setup import PassShape
from topwork.training.passes import Memory, PassPlan, plan_passes
from topwork.training.together import members_that_fit


def trials_that_fit(on: Session, recipes: Sequence[Recipe], longest: int = 0) -> int:
    """How many of the first recipes' adapters fit into free memory together with a pass that holds the `longest`
    sequence; at least 1."""
    training = recipes[0].training
    memory = _memory(on.base, recipes, 0, usable(free_memory(on.base.device)))
    asked = training.tokens_per_pass, training.activation_checkpointing
    return members_that_fit(memory.setup, memory.total_bytes, *asked, longest)


def passes_that_fit(
    recipes: Sequence[Recipe], longest: int, asked: int | None, base: Base, log: Callable[[str], None]
) -> PassPlan:
    """Tokens per pass, as asked or from free memory, and the layers that are checkpointed; `longest` has to fit. The
    adapters stand in the base.

    `asked` is the recipe's, or that of the run which goes on: the latter is left where it does not fit any more. Raises
    RequestError where no pass fits that nobody asked for.
    """
    checkpointing = recipes[0].training.activation_checkpointing
    free = free_memory(base.device)
    memory = replace(_memory(base, recipes, len(recipes), usable(free)), longest=longest)
    kept = asked != recipes[0].training.tokens_per_pass  # memory may have made it smaller than the longest
    plan = plan_passes(asked, checkpointing, 0 if kept else longest, memory)
    if base.device.type == "cpu" and not memory.holds(plan.tokens_per_pass, plan.checkpointed_layers):
        taken = _takes(plan, _still(memory, plan, free))
        if asked is not None and kept:
            log(f"{taken}, and {free_told(free)} are free: the run goes on with fewer, to the same result")
            return passes_that_fit(recipes, longest, None, base, log)
        _too_little(recipes[0], f"{taken} beside the base, and {free_told(free)} are free", log)
    _tell(plan, memory, asked, checkpointing == "auto", free, log)
    needed = memory.needed_bytes(plan.tokens_per_pass, plan.checkpointed_layers)
    log(f"memory: {gigabytes(needed)} planned at the peak, of {gigabytes(memory.total_bytes)}")
    return plan


def _still(memory: Memory, plan: PassPlan, free: Free) -> int:
    """What it will take beside what was taken already."""
    needed = memory.needed_bytes(plan.tokens_per_pass, plan.checkpointed_layers)
    return needed - (memory.total_bytes - usable(free)) + free.bytes - usable(free)


def _takes(plan: PassPlan, needed: int) -> str:
    return f"training with {plan.tokens_per_pass:,} tokens per pass takes about {needed / 10**6:,.0f} MB"


def _too_little(recipe: Recipe, told: str, log: Callable[[str], None]) -> None:
    """A size that was asked for is tried. Raises RequestError where it was not, as `refuse` does."""
    if recipe.training.tokens_per_pass is None:
        refuse(told, f"{_less(recipe)}. {_TRIED}", log)
        return
    log(
        f"warning: {told}; the run may be ended for want of memory. A smaller training.tokens_per_pass, or none, "
        "leaves the result as it is"
    )


def refuse_small_memory(recipe: Recipe, longest: int = SMALLEST_PASS, log: Callable[[str], None] = print) -> None:
    """Before any weight is read. Raises RequestError where base, adapter and the smallest pass are more than what is
    free in the memory of a CPU, or the base alone where the recipe names the size of a pass, which is then tried; a
    base that cannot be built without its weights is for its loading to speak of."""
    refuse_large_members([recipe], longest, log)


def refuse_large_members(
    recipes: Sequence[Recipe], longest: int = SMALLEST_PASS, log: Callable[[str], None] = print
) -> None:
    """The same of recipes on one base that train in waves, each of which has to fit alone. The largest is told, and how
    many are too large."""
    if pick_device(recipes[0].model.device).type != "cpu":
        return
    try:
        structure = structure_named(recipes[0].model)
    except ModelError:
        return
    free = free_memory(torch.device("cpu"))
    known: dict[str, int] = {}
    alike = [f"{recipe.adapter.model_dump_json()} {recipe.training.optim}" for recipe in recipes]
    for key, recipe in zip(alike, recipes):
        if key not in known:
            known[key] = _needed_alone(recipe, structure, longest, free)
    needed, largest = max(((known[key], recipe) for key, recipe in zip(alike, recipes)), key=itemgetter(0))
    if needed > free.bytes:
        short = sum(known[key] > free.bytes for key in alike)
        several = f"{short} of {len(recipes)} members do not fit into memory, not even alone: the largest "
        weights = sum(base_bytes(setup_of([largest], structure)))
        there = free.bytes + taken_memory(torch.device("cpu"))
        refuse(
            (several if len(recipes) > 1 else "training ")
            + f"takes at least {needed / 10**6:,.0f} MB, {weights / 10**6:,.0f} of them the base's weights, and "
            f"{free_told(free)} are free",
            _less(largest) + (f". {_TRIED}" if weights <= free.bytes else ""), log,
            would_fit(Job([largest], structure, "cpu", there, longest)),
        )  # fmt: skip


def _needed_alone(recipe: Recipe, structure: Structure, longest: int, free: Free) -> int:
    """Of a run beside what the process holds already."""
    setup = replace(setup_of([recipe], structure), process_bytes=0)
    if recipe.training.tokens_per_pass is not None:
        return sum(base_bytes(setup))
    return _least_bytes(setup, recipe, longest) + free.bytes - usable(free)


def _least_bytes(setup: Setup, recipe: Recipe, longest: int) -> int:
    """With the smallest pass, or the longest sequence where that is longer, and all the layers checkpointed that may
    be."""
    every = setup.structure.checkpointable
    asked = recipe.training.activation_checkpointing
    layers = {"off": 0, "full": every, "auto": max(0, every - 1)}.get(str(asked), asked)
    assert isinstance(layers, int)
    tokens = max(SMALLEST_PASS, longest)
    steps = moments(setup, PassShape(tokens, tokens, longest), layers)
    return round(MARGIN[setup.device] * max(usage.bytes for usage in steps))


_TRIED = "A training.tokens_per_pass that the recipe names is tried"


def _less(recipe: Recipe) -> str:
    """What would fit."""
    packed = "" if recipe.quantization.active else "quantization.load_in_4bit: true, "
    return f"Give more memory, or lower what is needed: {packed}a smaller base, adapter.r or data.max_length"


def _tell(
    plan: PassPlan, memory: Memory, asked: int | None, auto: bool, free: Free, log: Callable[[str], None]
) -> None:
    if asked is None:
        log(
            f"tokens per pass: {plan.tokens_per_pass:,}, from {free.source}; set training.tokens_per_pass to repeat a "
            "run to the bit"
        )
    if plan.checkpointed_layers:
        why, there = f", from {free.source}" if auto else "", memory.setup.structure.checkpointable
        log(f"activation checkpointing: {plan.checkpointed_layers} of {there} layers{why}")


def _memory(base: Base, recipes: Sequence[Recipe], grafted: int, free_bytes: int) -> Memory:
    """What is planned with while the base, and the first `grafted` recipes' adapters on it, are in memory: whatever the
    process holds beside them, nobody need know why."""
    device: Literal["cpu", "cuda"] = "cuda" if base.device.type == "cuda" else "cpu"
    layers = len(decoder_layers(base.module))
    structure = replace(structure_named(recipes[0].model), fast=is_fast(base.module), checkpointable=layers)
    setup, taken = setup_of(recipes, structure, device), taken_memory(base.device)
    there = sum(base_bytes(setup)) + sum(adapter_bytes(member, structure) for member in setup.members[:grafted])
    return Memory(replace(setup, process_bytes=taken - there), taken + free_bytes)
