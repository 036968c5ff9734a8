"""Virtual tokens in a batch: every sequence of an adapter that has some gets so many rows in front.

Nobody outside a pass knows: what comes back are the rows of the batch that was given. The rows in front are positions
0 to P - 1 and the text begins at P, as in PEFT; attention keeps sequences apart by their bounds as always, so packed
sequences see their own virtual tokens and no others.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import nn

from topwork.ops.batch import Batch, Segment
from topwork.ops.context import PassContext, Virtual, current
from topwork.ops.host import sent


def virtual_tokens(embedding: nn.Module, adapter: str | None) -> Virtual | None:
    """What an adapter has in front of every text: a part of the embedding's layer tells it."""
    part_of = getattr(embedding, "part", None)
    tell = getattr(part_of(adapter), "virtual", None) if part_of is not None else None
    found: Virtual | None = tell() if tell is not None else None
    return found


def with_virtual_tokens(embedding: nn.Module, batch: Batch) -> PassContext:
    """A pass over the batch with the virtual tokens of all its adapters."""
    names = {segment.adapter for segment in batch.segments if segment.adapter is not None}
    found = {name: virtual_tokens(embedding, name) for name in sorted(names)}
    virtual = {name: tokens for name, tokens in found.items() if tokens is not None}
    return expanded(batch, virtual) if virtual else _context(batch)


def _context(batch: Batch) -> PassContext:
    return replace(current(), batch=batch, virtual=(), given_rows=None, cache=None)


def expanded(batch: Batch, virtual: Mapping[str, Virtual]) -> PassContext:
    """A pass over `batch` with rows in front of every sequence (that has tokens) of the adapters named. What goes where
    is worked out on the host."""
    ahead = _rows_ahead(batch, virtual)
    shifts, device = list(accumulate(ahead)), batch.tokens.device
    bounds = tuple(bound + shift for bound, shift in zip(batch.cu_seqlens, [0, *shifts]))
    moved = dict(zip(batch.cu_seqlens, bounds))
    segments = tuple(Segment(moved[s.start], moved[s.stop], s.adapter) for s in batch.segments)
    lengths = torch.tensor([stop - start for start, stop in pairwise(batch.cu_seqlens)])
    rows_there = torch.arange(len(batch)) + torch.tensor(shifts).repeat_interleave(lengths)
    before = torch.tensor(ahead).repeat_interleave(lengths)
    rows = sent(rows_there, device)
    placed = _placed(segments, bounds, ahead, virtual, device)

    tokens = batch.tokens.new_zeros(bounds[-1]).index_copy(0, rows, batch.tokens)
    positions = torch.zeros_like(tokens).index_copy(0, rows, batch.positions + sent(before, device))
    for each in placed:
        assert each.rows is not None
        copies = torch.arange(each.count, device=device).repeat(len(each.rows) // each.count)
        positions = positions.index_copy(0, each.rows, copies)
    labels, seeds, wanted = batch.labels, batch.dropout_seeds, batch.output_positions
    on_host = replace(labels.on_host, positions=rows_there[labels.on_host.positions])
    longer = Batch(
        tokens, positions, bounds, segments,
        replace(labels, positions=rows[labels.positions], host=None if labels.host is None else on_host),
        None if wanted is None else rows[wanted], batch.output_segments,
        None if seeds is None else torch.zeros_like(tokens).index_copy(0, rows, seeds),
    )  # fmt: skip
    return replace(_context(longer), virtual=placed, given_rows=rows)


def _rows_ahead(batch: Batch, virtual: Mapping[str, Virtual]) -> list[int]:
    """How many rows go in front of each sequence."""
    counts, at = [], 0
    for start, stop in pairwise(batch.cu_seqlens):
        while batch.segments[at].stop < stop:
            at += 1
        tokens = virtual.get(batch.segments[at].adapter or "")
        counts.append(tokens.count if tokens is not None and stop > start else 0)
    return counts


def _placed(
    segments: tuple[Segment, ...], bounds: tuple[int, ...], ahead: list[int], virtual: Mapping[str, Virtual],
    device: torch.device,
) -> tuple[Virtual, ...]:  # fmt: skip
    """One for each adapter, with the first rows of all its sequences."""
    starts: dict[str, list[int]] = {name: [] for name in virtual}
    at = 0
    for start, count in zip(bounds, ahead):
        while segments[at].stop <= start and at + 1 < len(segments):
            at += 1
        if count:
            starts[segments[at].adapter or ""].append(start)
    found = []
    for name, tokens in virtual.items():
        if firsts := starts[name]:
            rows = torch.tensor(firsts)[:, None] + torch.arange(tokens.count)
            found.append(replace(tokens, rows=sent(rows.flatten(), device)))
    return tuple(found)
