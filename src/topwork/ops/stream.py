"""The flat stream: one batch as one row of tokens, without padding.

A stream of T tokens holds S sequences end to end. Attention never crosses a sequence; positions restart at 0 in each.
Segments say which token ranges belong to which adapter. While a model runs, its stream is *active*: the registered
attention function and the adapted layers read it from there, because Hugging Face models pass neither on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from topwork.ops.dropout import Dropout, token_draws


@dataclass(frozen=True)
class Segment:
    """Tokens `start:stop` of a stream belong to `adapter`; None is the bare base (DPO's reference, for one)."""

    start: int
    stop: int
    adapter: str | None


@dataclass(frozen=True)
class Virtual:
    """An adapter's P learned tokens that stand before a text: embeddings [P, d] (prompt tuning), or for each layer the
    keys and values [2, P, H_kv, D] that attention sees of them (prefix tuning)."""

    count: int
    embeddings: Tensor | None = None
    keys_values: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Placed:
    """Where virtual tokens stand in a stream: rows [S * P] int64, those of one sequence after those of another."""

    rows: Tensor
    virtual: Virtual

    def over(self, x: Tensor, learned: Tensor) -> Tensor:
        """x [T, ...] with `learned` [P, ...] in the place of these rows; gradients reach both."""
        copies = len(self.rows) // self.virtual.count
        values = learned.to(x.dtype).expand(copies, *learned.shape).flatten(0, 1)
        return x.index_copy(0, self.rows, values)


@dataclass(frozen=True)
class Stream:
    """One forward pass.

    tokens      [T] int64
    positions   [T] int64, restarting at 0 in each sequence
    bounds      S + 1 ints: sequence s is tokens[bounds[s]:bounds[s + 1]] (cu_seqlens, kept on the host)
    segments    cover 0..T in order, without gaps; each begins and ends at a sequence's bound
    rows        [N] int64: the hidden states that predict a learned token (its position - 1)
    targets     [N] int64: that learned token
    weights     [N] float32: the weight with which it is learned
    cache       keys and values of earlier passes, while generating; else None
    wanted      [n] int64, rising: the hidden states that will be looked at, None for all; a last layer may stop there
    draws       [T] int64: what dropout draws from (`ops/dropout.py`), where an adapter may drop out; else None
    placed      the virtual tokens in it, which `models/virtual.py` puts there; nobody else makes streams with any
    """

    tokens: Tensor
    positions: Tensor
    bounds: tuple[int, ...]
    segments: tuple[Segment, ...]
    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    targets: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    cache: Any = None
    wanted: Tensor | None = None
    draws: Tensor | None = None
    placed: tuple[Placed, ...] = ()

    def to(self, device: torch.device) -> "Stream":
        """The same stream with its tensors on `device`."""
        names = ("tokens", "positions", "rows", "targets", "weights", "wanted", "draws")
        found = {name: tensor.to(device) for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **found)

    def drawn(self, seeds: Sequence[int]) -> "Stream":
        """The same stream, its sequences with a seed each (`common/seeds.py`) for what drops out in them."""
        lengths = torch.tensor([stop - start for start, stop in pairwise(self.bounds)], device=self.tokens.device)
        by_token = torch.tensor(seeds, device=self.tokens.device).repeat_interleave(lengths)
        return replace(self, draws=token_draws(by_token, self.positions))

    def prefixes(self, layer: int) -> tuple[tuple[Placed, Tensor], ...]:
        """Where the keys and values [2, P, H_kv, D] of a layer are learned, and those."""
        return tuple((at, at.virtual.keys_values[layer]) for at in self.placed if at.virtual.keys_values)

    def with_prefix(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys and values [T, H_kv, D] of a layer, rotated, with the learned ones in their places."""
        for placed, learned in self.prefixes(layer):
            keys, values = placed.over(keys, learned[0]), placed.over(values, learned[1])
        return keys, values

    def learned(self) -> list[Tensor]:
        """The keys and values in it that learn: what a layer takes from here and not from what it is given."""
        return [x for placed in self.placed for x in placed.virtual.keys_values if x.requires_grad]

    def with_learned(self, tensors: Sequence[Tensor]) -> "Stream":
        """The same stream with others in the places of those that `learned` tells."""
        given = iter(tensors)

        def taken(placed: Placed) -> Placed:
            own = tuple(next(given) if x.requires_grad else x for x in placed.virtual.keys_values)
            return replace(placed, virtual=replace(placed.virtual, keys_values=own))

        return replace(self, placed=tuple(taken(placed) for placed in self.placed))

    def of_rows(self, rows: int) -> "Stream":
        """The stream as a tensor of so many rows has it: all tokens, or what a last layer has left of them."""
        return self if self.wanted is None or rows == len(self.tokens) else self.narrowed()

    def narrowed(self) -> "Stream":
        """Only the wanted rows, for what comes after attention: their segments and draws, no longer their sequences."""
        assert self.wanted is not None
        draws = None if self.draws is None else self.draws[self.wanted]
        parts = zip(self.by_segment(self.wanted), self.segments)
        segments = tuple(Segment(part.start, part.stop, segment.adapter) for part, segment in parts)
        return replace(self, segments=segments, wanted=None, draws=draws)

    def dropout(self, share: float, key: int, rows: slice) -> Dropout:
        """What drops a share of these rows' values on their way into a layer of this key."""
        if self.draws is None:
            raise RuntimeError(
                "an adapter with lora_dropout is in training, and its stream tells nothing to draw from; give "
                "`stream.drawn(seeds)`, a seed for each sequence, or switch dropout off: adapters.train(name, False)"
            )
        return Dropout(share, key, self.draws[rows])

    def by_segment(self, rows: Tensor) -> list[slice]:
        """The part of some rows [n], which rise, that lies in each segment."""
        if len(self.segments) == 1:
            return [slice(0, len(rows))]
        stops = torch.tensor([segment.stop for segment in self.segments], device=rows.device)
        ends = torch.searchsorted(rows, stops).tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends)]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the stream that attention and adapted layers read, until the block ends."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)


_ACTIVE: ContextVar[Stream | None] = ContextVar("topwork_active_stream", default=None)


def active_stream() -> Stream:
    """The stream being run. Raises RuntimeError outside `Stream.active()`."""
    stream = _ACTIVE.get()
    if stream is None:
        raise RuntimeError(
            "a model prepared by Topwork was called without a stream; call it through topwork.models.base.Base "
            "(hidden, log_probabilities) or inside `with stream.active():`"
        )
    return stream


def stream_of(sequences: list[Tensor], adapter: str | None = None) -> Stream:
    """Sequences of token ids, end to end, all for one adapter; nothing is learned from it."""
    bounds = [0]
    for part in sequences:
        bounds.append(bounds[-1] + len(part))
    positions = torch.cat([torch.arange(len(part), device=part.device) for part in sequences])
    segment = Segment(0, bounds[-1], adapter)
    return Stream(torch.cat(sequences), positions, tuple(bounds), (segment,))
