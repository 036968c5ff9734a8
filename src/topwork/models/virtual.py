"""Virtual tokens in a flat stream: every sequence of an adapter that has some gets so many rows in front.

Nobody outside a pass knows: what comes back are the rows of the stream that was given. The rows in front are positions
0 to P - 1 and the text begins at P, as in PEFT; attention keeps sequences apart by their bounds as always, so packed
sequences see their own virtual tokens and no others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from topwork.ops.stream import Placed, Segment, Stream, Virtual


@dataclass(frozen=True)
class Expanded:
    """A stream with virtual tokens in it. Row i of the stream that was given is its row rows[i]; None: the same."""

    stream: Stream
    rows: Tensor | None = None

    def back(self, hidden: Tensor) -> Tensor:
        """Hidden states as the caller's stream has them, from all rows or, [n, d], from those that were wanted."""
        return hidden if self.rows is None or len(hidden) != len(self.stream.tokens) else hidden[self.rows]


def virtual_tokens(embedding: nn.Module, adapter: str | None) -> Virtual | None:
    """What an adapter has in front of every text: a part of the embedding's layer tells it."""
    part_of = getattr(embedding, "part", None)
    tell = getattr(part_of(adapter), "virtual", None) if part_of is not None else None
    found: Virtual | None = tell() if tell is not None else None
    return found


def with_virtual_tokens(embedding: nn.Module, stream: Stream) -> Expanded:
    """The stream with the virtual tokens of all its adapters."""
    names = {segment.adapter for segment in stream.segments if segment.adapter is not None}
    found = {name: virtual_tokens(embedding, name) for name in sorted(names)}
    virtual = {name: tokens for name, tokens in found.items() if tokens is not None}
    return expanded(stream, virtual) if virtual else Expanded(stream)


def expanded(stream: Stream, virtual: Mapping[str, Virtual]) -> Expanded:
    """`stream` with rows in front of every sequence (that has tokens) of the adapters named."""
    ahead = _rows_ahead(stream, virtual)
    shifts = list(accumulate(ahead))
    device, count = stream.tokens.device, len(stream.tokens)
    lengths = torch.tensor([stop - start for start, stop in zip(stream.bounds, stream.bounds[1:])], device=device)
    at = torch.tensor([ahead, shifts], device=device).repeat_interleave(lengths, 1)
    rows = torch.arange(count, device=device) + at[1]
    tokens = stream.tokens.new_zeros(count + shifts[-1])
    positions = torch.zeros_like(tokens)
    tokens[rows], positions[rows] = stream.tokens, stream.positions + at[0]
    bounds = tuple(bound + shift for bound, shift in zip(stream.bounds, [0, *shifts]))
    moved = dict(zip(stream.bounds, bounds))
    segments = tuple(Segment(moved[s.start], moved[s.stop], s.adapter) for s in stream.segments)
    placed = _placed(segments, bounds, ahead, virtual, device)
    for each in placed:
        positions[each.rows] = torch.arange(each.virtual.count, device=device).repeat(
            len(each.rows) // each.virtual.count
        )
    draws = None if stream.draws is None else torch.zeros_like(tokens).index_copy(0, rows, stream.draws)
    longer = replace(
        stream, tokens=tokens, positions=positions, bounds=bounds, segments=segments, placed=placed, draws=draws,
        rows=rows[stream.rows], wanted=None if stream.wanted is None else rows[stream.wanted],
    )  # fmt: skip
    return Expanded(longer, rows)


def _rows_ahead(stream: Stream, virtual: Mapping[str, Virtual]) -> list[int]:
    """How many rows go in front of each sequence."""
    counts, at = [], 0
    for start, stop in zip(stream.bounds, stream.bounds[1:]):
        while stream.segments[at].stop < stop:
            at += 1
        tokens = virtual.get(stream.segments[at].adapter or "")
        counts.append(tokens.count if tokens is not None and stop > start else 0)
    return counts


def _placed(
    segments: tuple[Segment, ...], bounds: tuple[int, ...], ahead: list[int], virtual: Mapping[str, Virtual],
    device: torch.device,
) -> tuple[Placed, ...]:  # fmt: skip
    """One for each adapter, with the first rows of all its sequences."""
    starts: dict[str, list[int]] = {name: [] for name in virtual}
    at = 0
    for start, count in zip(bounds, ahead):
        while segments[at].stop <= start and at + 1 < len(segments):
            at += 1
        if count:
            starts[segments[at].adapter or ""].append(start)
    return tuple(
        Placed(
            (torch.tensor(firsts, device=device)[:, None] + torch.arange(tokens.count, device=device)).flatten(), tokens
        )
        for name, tokens in virtual.items() if (firsts := starts[name])
    )  # fmt: skip
