"""An optimizer step's rows as forward passes, and how large a pass may be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType

import torch

from topwork.common.errors import RecipeError
from topwork.common.seeds import hashed
from topwork.data.batches import AdapterRows, collate_segments, pack, together
from topwork.ops.batch import Batch
from topwork.training.config import Checkpointing
from topwork.training.memory import Setup, fitting_pass, needed_bytes


def step_passes(
    groups: Sequence[AdapterRows],
    tokens_per_pass: int,
    device: torch.device,
    virtual: Mapping[str, int] = MappingProxyType({}),
    seeds: Mapping[str, int] | None = None,
    stretch: bool = False,
) -> list[Batch]:
    """The rows that each adapter brings, packed into as few passes as fit; its rows in a pass are one segment.
    `virtual` is how many tokens an adapter puts in front of each of its rows, by its name, and `seeds` decides what
    drops out in them, however they are packed. What alone is longer than a pass is DataError, or with `stretch` has a
    pass of its own."""
    rows = [(at, example) for at, (_, examples) in enumerate(groups) for example in examples]

    def by_adapter(indices: Sequence[int]) -> list[AdapterRows]:
        by_group = groupby(indices, lambda index: rows[index][0])  # rising, so that an adapter's stand together
        return [(groups[at][0], [rows[index][1] for index in own]) for at, own in by_group]

    extra = [virtual.get(str(name), 0) for name, _ in groups]
    lengths = [len(example.tokens) + extra[at] for at, example in rows]
    kept = together(groups)
    sizes = [sum(lengths[i] for i in own) for own in kept]
    budget = max([tokens_per_pass, *sizes]) if stretch else tokens_per_pass
    units = pack(sizes, budget, [rows[own[0]][0] for own in kept])
    packed = [[index for unit in numbers for index in kept[unit]] for numbers in units]
    batches = [collate_segments(by_adapter(indices)) for indices in packed]
    if seeds is not None:
        by_row = [hashed(seeds[str(name)], number) for name, examples in groups for number in range(len(examples))]
        batches = [batch.with_dropout_seeds([by_row[index] for index in own]) for batch, own in zip(batches, packed)]
    return [batch.to(device) for batch in batches]


@dataclass(frozen=True)
class PassPlan:
    """How large a pass may be, and how many layers are checkpointed for it."""

    tokens_per_pass: int
    checkpointed_layers: int


@dataclass(frozen=True)
class Memory:
    """What a run is planned with: what is trained on what, the bytes there are for all of it, what the process has
    taken already included, and the longest sequence (0: as long as a pass). Every row may be learned whole."""

    setup: Setup
    total_bytes: int
    longest: int = 0

    def needed_bytes(self, tokens: int, checkpointed_layers: int) -> int:
        """What training in passes of so many tokens needs."""
        return needed_bytes(self.setup, tokens, 1.0, self.longest or tokens, checkpointed_layers)

    def holds(self, tokens: int, checkpointed_layers: int) -> bool:
        """Whether a pass of so many tokens fits."""
        return self.needed_bytes(tokens, checkpointed_layers) <= self.total_bytes


def plan_passes(asked_tokens: int | None, asked_layers: Checkpointing, longest: int, memory: Memory) -> PassPlan:
    """The token budget and the checkpointed layers, each as asked for or from memory (`memory.py`'s `fitting_pass`).
    Raises RecipeError where the longest sequence does not fit into what was asked for."""
    check_longest(asked_tokens, longest)
    return PassPlan(*fitting_pass(memory.setup, memory.total_bytes, 1.0, longest, asked_layers, asked_tokens))


def check_longest(tokens_per_pass: int | None, longest: int) -> None:
    """Raises RecipeError where the longest sequence, with its virtual tokens, is longer than the asked pass."""
    if tokens_per_pass is not None and longest > tokens_per_pass:
        raise RecipeError(
            f"training.tokens_per_pass is {tokens_per_pass}, and the longest sequence has {longest} tokens; a sequence "
            f"is not cut in two. Give at least {longest}, leave it out, or set data.max_length lower."
        )
