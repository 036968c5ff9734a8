"""Which rows a step sees, how they are packed into passes, and the batch of a pass."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from topwork.common.errors import DataError
from topwork.data.examples import Example, grouped
from topwork.data.splitting import permuted
from topwork.ops.batch import Batch, Labels, Segment

AdapterRows = tuple[str | None, Sequence[Example]]


def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch sees the rows; decided by seed and epoch alone, so a resumed run finds it again."""
    return permuted(count, [seed, epoch])


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Optimizer steps per epoch; the last one may be short."""
    return -(-count // batch_size)


def step_indices(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The rows of optimizer step `step`, counted from 0 across epochs."""
    return Order(count, batch_size, seed).step(step)


class Order:
    """`step_indices` of one data set, with the order of the epoch that was last asked for at hand."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epoch, self._rows = -1, np.empty(0)

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.count, self.batch_size)

    def step(self, step: int) -> list[int]:
        """The rows of optimizer step `step`, counted from 0 across epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._rows = order(self.count, self.seed, epoch)
            self._epoch = epoch
        return [int(row) for row in self._rows[within * self.batch_size : (within + 1) * self.batch_size]]


def pack(lengths: Sequence[int], budget: int, owners: Sequence[int] | None = None) -> list[list[int]]:
    """Sequences put into passes of at most `budget` tokens each: best fit, the longest first.

    `owners` numbers the adapter of each sequence: an adapter's go into passes that it has begun, then into what the
    others before it left, so that a pass has few adapters (each that it has costs a read of its weights and gradients).
    Returns the indices of each pass; every index stands in one of them. The same lengths give the same passes. Raises
    DataError for a sequence longer than the budget.
    """
    passes: list[list[int]] = []
    own_room: list[tuple[int, int]] = []  # (tokens left, pass), sorted: passes that this owner has begun
    other_room: list[tuple[int, int]] = []
    owner_of = owners or [0] * len(lengths)
    before: int | None = None
    for index in sorted(range(len(lengths)), key=lambda index: (owner_of[index], -lengths[index], index)):
        length = lengths[index]
        if length > budget:
            raise DataError(
                f"a sequence (or a group that stays together) of {length:,} tokens does not fit into a pass of "
                f"training.tokens_per_pass = {budget:,}; set tokens_per_pass to at least {length}, or a smaller "
                "data.max_length"
            )
        if owner_of[index] != before:
            other_room, own_room, before = sorted(other_room + own_room), [], owner_of[index]
        place = _taken(own_room, length) or _taken(other_room, length)
        if place is None:
            place = budget, len(passes)
            passes.append([])
        left, number = place
        passes[number].append(index)
        insort(own_room, (left - length, number))
    return [sorted(indices) for indices in passes]


def together(groups: Sequence[AdapterRows]) -> list[list[int]]:
    """The examples of all groups, counted through: those that stay in one pass, in the order of the first of each."""
    found, start = [], 0
    for _, examples in groups:
        found += [[start + number for number in own] for own in grouped(examples)]
        start += len(examples)
    return found


def _taken(room: list[tuple[int, int]], length: int) -> tuple[int, int] | None:
    """The pass with the least room that holds so many tokens, taken out of the list."""
    at = bisect_left(room, (length, -1))
    return room.pop(at) if at < len(room) else None


def collate(examples: Sequence[Example], adapter: str | None = "default") -> Batch:
    """One pass whose tokens all belong to one adapter."""
    return collate_segments([(adapter, examples)])


def collate_segments(groups: Sequence[AdapterRows]) -> Batch:
    """One pass: each group's examples are a segment of its adapter (None: the bare base). On the CPU."""
    examples = [example for _, group in groups for example in group]
    if not examples:
        raise ValueError("a pass needs at least one example")
    lengths = [len(example.tokens) for example in examples]
    tokens = _int64(np.concatenate([example.tokens for example in examples]))
    return Batch(
        tokens=tokens,
        positions=_int64(np.concatenate([np.arange(length) for length in lengths])),
        cu_seqlens=(0, *(int(bound) for bound in np.cumsum(lengths))),
        segments=_segments(groups),
        labels=_labels(groups, tokens),
    )


def _labels(groups: Sequence[AdapterRows], tokens: Tensor) -> Labels:
    examples = [example for _, group in groups for example in group]
    weights = np.concatenate([example.weights for example in examples])
    learned = np.flatnonzero(weights)
    sequences = np.repeat(np.arange(len(examples)), [len(example.tokens) for example in examples])
    columns = {name: np.concatenate(parts)[learned] for name, parts in _columns(groups).items()}
    return Labels(
        positions=_int64(learned - 1),
        targets=tokens[torch.from_numpy(learned)],
        loss_weights=torch.from_numpy(weights[learned].astype(np.float32)),
        sequences=_int64(sequences[learned]),
        groups=_group_numbers(groups),
        columns={name: torch.from_numpy(column.astype(np.float32)) for name, column in columns.items()},
    )


def _columns(groups: Sequence[AdapterRows]) -> dict[str, list[np.ndarray]]:
    """Each column in the rows of all adapters, and not a number in those of an adapter whose rows do not have it.

    Raises DataError where only some of an adapter's rows do.
    """
    names = sorted({name for _, examples in groups for example in examples for name in example.columns})
    for adapter, examples in groups:
        for name in names:
            without = [example.source for example in examples if name not in example.columns]
            if 0 < len(without) < len(examples):
                raise DataError(
                    f"{len(without)} of {len(examples)} rows for {adapter} have no column {name!r} (first "
                    f"{without[0]}); give it to all of them, or to none"
                )
    rows = [example for _, examples in groups for example in examples]
    return {name: [row.columns.get(name, np.full(len(row.tokens), np.nan)) for row in rows] for name in names}


def _group_numbers(groups: Sequence[AdapterRows]) -> tuple[int, ...]:
    """Of each sequence the number of the group that it is in; an adapter's groups are its own."""
    numbers: dict[tuple[int, object], int] = {}
    found = []
    for owner, (_, examples) in enumerate(groups):
        for at, example in enumerate(examples):
            key = (owner, ("alone", at) if example.group is None else example.group)
            found.append(numbers.setdefault(key, len(numbers)))
    return tuple(found)


def _segments(groups: Sequence[AdapterRows]) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    start = 0
    for adapter, group in groups:
        stop = start + sum(len(example.tokens) for example in group)
        if stop > start:
            segments.append(Segment(start, stop, adapter))
        start = stop
    return tuple(segments)


def _int64(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
