"""Attention of new rows over paged keys and values, in plain torch.

A pass holds rows of several sequences, each the next ones of a text whose keys and values before lie in blocks
(`ops/paged.py`). Row i of a sequence sees the positions up to its own.

On a CPU every row attends alone, over exactly what it sees: the call is a function of the row's position, and its
result cannot depend on how a text was cut or on who else is there. On a GPU a call per row would be thousands of
launches: sequences with one row go together, longer ones each alone, over whole blocks under a mask. That a row's sums
come out alike in both is not measured there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.attention_reference import AttentionRule, attend
from topwork.ops.host import sent
from topwork.ops.paged import BLOCK, read_blocks

Pool = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Span:
    """Rows start:start + count of a pass: a sequence's positions from `first` on, in these of the pool's blocks."""

    start: int
    count: int
    first: int
    blocks: Sequence[int]

    @property
    def seen(self) -> int:
        """Positions that its last row sees."""
        return self.first + self.count


@dataclass(frozen=True, eq=False)
class PagedRows:
    """The spans of a pass, end to end from its first row on, and what of them every layer needs on the device. Rows
    behind the last span write nothing and see nothing."""

    spans: tuple[Span, ...]
    device: torch.device
    _masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict, init=False)

    @property
    def rows(self) -> int:
        """How many rows there are in all spans."""
        return self.spans[-1].start + self.spans[-1].count if self.spans else 0

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """For each row the block that its key and value go to, and where in it: [rows] int64 each."""
        at = [(s.blocks[p // BLOCK], p % BLOCK) for s in self.spans for p in range(s.first, s.seen)]
        block, offset = sent(torch.tensor(at, dtype=torch.int64).view(-1, 2).t().contiguous(), self.device)
        return block, offset

    @cached_property
    def groups(self) -> list[tuple[Tensor | slice, Tensor, Tensor]]:
        """What is attended in one call: its rows, its sequences' blocks [S, N] and the positions [S, L] of its rows.
        Sequences with one row first; theirs are filled up to the longest with block 0, which the mask hides."""
        singles = [span for span in self.spans if span.count == 1]
        found: list[tuple[Tensor | slice, Tensor, Tensor]] = []
        if singles:
            most = max(-(-span.seen // BLOCK) for span in singles)
            tables = [[*span.blocks[:most], *[0] * (most - len(span.blocks))] for span in singles]
            rows = torch.tensor([span.start for span in singles])
            places = torch.tensor([[span.first] for span in singles])
            found.append((sent(rows, self.device), sent(torch.tensor(tables), self.device), sent(places, self.device)))
        for span in self.spans:
            if span.count > 1:
                table = torch.tensor([span.blocks[: -(-span.seen // BLOCK)]])
                places = torch.arange(span.first, span.seen)[None]
                own = slice(span.start, span.start + span.count)
                found.append((own, sent(table, self.device), sent(places, self.device)))
        return found

    @cached_property
    def tables(self) -> list[Tensor]:
        """The blocks of each span that its rows see."""
        return [torch.tensor(span.blocks[: -(-span.seen // BLOCK)]) for span in self.spans]

    def mask(self, group: int, window: int | None) -> Tensor:
        """What the rows of a group see: [S, 1, L, N * BLOCK]. Kept, because every layer of a pass asks for it."""
        if (group, window) not in self._masks:
            _, table, places = self.groups[group]
            at, own = torch.arange(table.shape[1] * BLOCK, device=self.device), places[:, None, :, None]
            seen = at <= own
            self._masks[group, window] = seen if window is None else seen & (at > own - window)
        return self._masks[group, window]


def attend_paged(
    pool: Pool, q: Tensor, k: Tensor, v: Tensor, rows: PagedRows, rule: AttentionRule, sinks: Tensor | None = None
) -> Tensor:
    """Attention [n, H, D] of a pass's n rows (q [n, H, D], k and v [n, H_kv, D], which are written to the pool) with
    all of their sequences so far; zeros for rows behind the last span. Without a gradient."""
    keys, values = pool
    block, offset = rows.places
    keys[block, :, :, offset] = k[: rows.rows].to(keys.dtype).unflatten(-1, (-1, keys.shape[-1]))
    values[block, :, offset] = v[: rows.rows].to(values.dtype)
    out = torch.zeros_like(q)
    if q.is_cpu:
        _row_by_row(pool, q, rows, rule, sinks, out)
    else:
        grouped_attention(pool, q, rows, rule, sinks, out)
    return out


def _row_by_row(pool: Pool, q: Tensor, rows: PagedRows, rule: AttentionRule, sinks: Tensor | None, out: Tensor) -> None:
    for span, table in zip(rows.spans, rows.tables):
        k, v = read_blocks(pool, table, span.seen)
        for row in range(span.start, span.start + span.count):
            stop = span.first + row - span.start + 1
            seen = slice(0 if rule.window is None else max(0, stop - rule.window), stop)
            out[row] = _alone(q[row], k[seen], v[seen], rule, sinks)


def _alone(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, sinks: Tensor | None) -> Tensor:
    """[H, D] of one query [H, D] that sees all of k and v [K, H_kv, D]."""
    key, value = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if rule.softcap is None and sinks is None:
        by_key_head = q.view(1, key.shape[1], -1, q.shape[-1])  # query heads of one key head are its rows
        return F.scaled_dot_product_attention(by_key_head, key, value, scale=rule.scale).view_as(q)
    all_seen = torch.ones(1, 1, 1, len(k), dtype=torch.bool)
    return attend(q[None, :, None], key, value, all_seen, rule, sinks)[0, :, 0]


def grouped_attention(
    pool: Pool, q: Tensor, rows: PagedRows, rule: AttentionRule, sinks: Tensor | None, out: Tensor
) -> None:
    """The form for a GPU: writes out [n, H, D] from the pool as it is."""
    keys, values = pool
    for number, (own, table, places) in enumerate(rows.groups):
        sequences, length = places.shape
        k = keys[table].permute(0, 2, 1, 4, 3, 5).reshape(sequences, keys.shape[1], -1, q.shape[-1])
        v = values[table].transpose(1, 2).reshape(sequences, values.shape[1], -1, values.shape[-1])
        beyond = torch.arange(k.shape[2], device=k.device) > places[:, -1:]
        for x in (k, v):  # of others, or nobody's: what is no number there would be none under a mask either
            x.masked_fill_(beyond[:, None, :, None], 0)
        query = q[own].unflatten(0, (sequences, length)).transpose(1, 2)
        found = attend(query, k, v, rows.mask(number, rule.window), rule, sinks)
        out[own] = found.transpose(1, 2).flatten(0, 1)
