"""A batch: sequences end to end as one flat row of tokens, without padding, and what is learned in it.

Attention never crosses a sequence; positions restart at 0 in each. Segments say which token ranges belong to which
adapter. A batch is data alone: what a model reads while it runs over one is its `PassContext` (`ops/context.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from topwork.ops.dropout import Dropout, token_seeds
from topwork.ops.host import sent


@dataclass(frozen=True)
class Segment:
    """Tokens `start:stop` of a batch belong to `adapter`; None is the bare base."""

    start: int
    stop: int
    adapter: str | None


def _none(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Labels:
    """The N tokens of a batch that something is learned from, in its order.

    positions     [N] int64, rising: the rows whose hidden states predict them (their own position - 1)
    targets       [N] int64: those tokens
    loss_weights  [N] float32: the weight with which each is learned
    sequences     [N] int64: the number of the sequence that each is in
    groups        for each of the S sequences the number of its group (a pair, the answers to one prompt), which stand
                  together in the order in which they were given
    columns       by name [N] float32: what else an objective reads (a reference's log-probabilities, advantages)
    host          the same as they were before they went to another device (without the columns that came after that)
    """

    positions: Tensor = field(default_factory=lambda: _none(torch.int64))
    targets: Tensor = field(default_factory=lambda: _none(torch.int64))
    loss_weights: Tensor = field(default_factory=lambda: _none(torch.float32))
    sequences: Tensor = field(default_factory=lambda: _none(torch.int64))
    groups: tuple[int, ...] = ()
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    host: "Labels | None" = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def on_host(self) -> "Labels":
        """The same where reading them does not wait for a GPU."""
        return self.to(torch.device("cpu")) if self.host is None else self.host

    def to(self, device: torch.device) -> "Labels":
        """The same on `device`."""
        if self.positions.device == device:
            return self
        columns = {name: sent(column, device) for name, column in self.columns.items()}
        host = self if self.positions.is_cpu else self.host
        return replace(self, **_tensors_on(self, device), columns=columns, host=None if device.type == "cpu" else host)

    def with_column(self, name: str, values: Tensor) -> "Labels":
        """The same with a column [N] more. Raises ValueError for another length."""
        if values.shape != self.positions.shape:
            raise ValueError(f"column {name} has the shape {[*values.shape]}, where [{len(self)}] is expected")
        return replace(self, columns={**self.columns, name: values})

    def column(self, name: str) -> Tensor:
        """A column [N]. Raises KeyError naming those there are."""
        if name not in self.columns:
            raise KeyError(f"the labels have no column {name!r}; they have {sorted(self.columns) or 'none'}")
        return self.columns[name]

    def by_sequence(self, values: Tensor) -> Tensor:
        """values [N] summed over each of the S sequences, [S]."""
        lengths = torch.bincount(self.on_host.sequences, minlength=len(self.groups))
        # not index_add, which on a GPU adds in any order; `unsafe` leaves out a look at the lengths, which would wait
        return torch.segment_reduce(values, "sum", lengths=sent(lengths, values.device), unsafe=True)

    def part(self, rows: slice, first: Segment, sequences: slice) -> "Labels":
        """Those of some rows, in the segment `first` whose sequences these are, counted from its beginning."""
        return Labels(
            self.positions[rows] - first.start,
            self.targets[rows],
            self.loss_weights[rows],
            self.sequences[rows] - sequences.start if len(self.sequences) else self.sequences,
            self.groups[sequences],
            {name: column[rows] for name, column in self.columns.items()},
            None if self.host is None else self.host.part(rows, first, sequences),
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """What goes through a model at once.

    tokens            [T] int64
    positions         [T] int64, restarting at 0 in each sequence
    cu_seqlens        S + 1 ints on the host: sequence s is tokens[cu_seqlens[s]:cu_seqlens[s + 1]]
    segments          cover 0..T in order, without gaps; each begins and ends where a sequence does
    labels            what is learned
    output_positions  [n] int64, rising: the hidden states that will be looked at, None for all; a last layer may stop
                      there
    output_segments   which of these are each segment's
    dropout_seeds     [T] int64: what dropout draws from (`ops/dropout.py`), where an adapter may drop out; else None
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: tuple[int, ...]
    segments: tuple[Segment, ...]
    labels: Labels = Labels()
    output_positions: Tensor | None = None
    output_segments: tuple[slice, ...] = ()
    dropout_seeds: Tensor | None = None

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max((stop - start for start, stop in pairwise(self.cu_seqlens)), default=0)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        return replace(self, **_tensors_on(self, device), labels=self.labels.to(device))

    def with_dropout_seeds(self, seeds: Sequence[int]) -> "Batch":
        """The same batch, its sequences with a seed each (`common/seeds.py`) for what drops out in them."""
        lengths = torch.tensor([stop - start for start, stop in pairwise(self.cu_seqlens)], device=self.tokens.device)
        by_token = torch.tensor(seeds, device=self.tokens.device).repeat_interleave(lengths)
        return replace(self, dropout_seeds=token_seeds(by_token, self.positions))

    def looked_at(self, rows: Tensor, by_segment: Sequence[slice] | None = None) -> "Batch":
        """The same batch of which some rows [n] are looked at, which rise; `by_segment` where it is known."""
        return replace(self, output_positions=rows, output_segments=tuple(by_segment or self.by_segment(rows)))

    def of_rows(self, rows: int) -> "Batch":
        """The batch as a tensor of so many rows has it: all tokens, or what a last layer has left of them."""
        return self if self.output_positions is None or rows == len(self) else self.narrowed()

    def narrowed(self) -> "Batch":
        """Only the output rows, for what comes after attention: their segments and seeds, no longer their sequences."""
        assert self.output_positions is not None
        seeds = None if self.dropout_seeds is None else self.dropout_seeds[self.output_positions]
        parts = zip(self.output_segments, self.segments, strict=True)
        segments = tuple(Segment(part.start, part.stop, segment.adapter) for part, segment in parts)
        return replace(self, segments=segments, output_positions=None, output_segments=(), dropout_seeds=seeds)

    def dropout(self, p: float, key: int, rows: slice) -> Dropout:
        """What drops a share of these rows' values on their way into a layer of this key."""
        if self.dropout_seeds is None:
            raise RuntimeError(
                "an adapter with lora_dropout is in training, and its batch tells nothing to draw from; give "
                "`batch.with_dropout_seeds(seeds)`, a seed for each sequence, or switch dropout off: "
                "adapters.train(name, False)"
            )
        return Dropout(p, key, self.dropout_seeds[rows])

    def by_segment(self, rows: Tensor) -> list[slice]:
        """The part of some rows [n], which rise, that lies in each segment. Waits for rows that are on a GPU."""
        if len(self.segments) == 1:
            return [slice(0, len(rows))]
        stops = torch.tensor([segment.stop for segment in self.segments])
        ends = torch.searchsorted(rows.cpu(), stops).tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends)]

    def parts(self) -> list[tuple[slice, "Batch"]]:
        """Each segment as a batch of its own, and which of the whole's labels are its."""
        if len(self.segments) == 1:
            return [(slice(None), self)]
        return [(rows, self._part(segment, rows)) for segment, rows in zip(self.segments, self.by_label())]

    def by_label(self) -> list[slice]:
        """The labels of each segment."""
        return self.by_segment(self.labels.on_host.positions)

    def _part(self, segment: Segment, rows: slice) -> "Batch":
        at = slice(segment.start, segment.stop)
        first = self.cu_seqlens.index(segment.start)
        inside = [bound - segment.start for bound in self.cu_seqlens[first:] if bound <= segment.stop]
        return Batch(
            self.tokens[at],
            self.positions[at],
            tuple(inside),
            (Segment(0, segment.stop - segment.start, segment.adapter),),
            self.labels.part(rows, segment, slice(first, first + len(inside) - 1)),
            dropout_seeds=None if self.dropout_seeds is None else self.dropout_seeds[at],
        )


def batch_of(sequences: Sequence[Tensor], adapter: str | None = None) -> Batch:
    """Sequences of token ids, end to end, all for one adapter; nothing is learned from it."""
    bounds = [0]
    for part in sequences:
        bounds.append(bounds[-1] + len(part))
    positions = torch.cat([torch.arange(len(part), device=part.device) for part in sequences])
    segment = Segment(0, bounds[-1], adapter)
    return Batch(torch.cat(list(sequences)), positions, tuple(bounds), (segment,))


def _tensors_on(held: "Batch | Labels", device: torch.device) -> dict[str, Any]:
    """Its tensors on another device, by field."""
    values = {at.name: getattr(held, at.name) for at in fields(held)}
    return {name: sent(value, device) for name, value in values.items() if isinstance(value, Tensor)}
