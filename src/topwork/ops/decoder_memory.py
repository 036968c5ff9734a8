"""Where a decoder layer (`ops/decoder_layer.py`) has what it is given, keeps and needs for a moment, as
native/decoder.c takes it."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from topwork.ops.context import handback_empty, handoff_empty, scratch_empty
from topwork.ops.parts import Placed
from topwork.ops.self_attention import Heads


class Stream(NamedTuple):
    """x [1, T, d] before the attention and [1, n, d] behind it, or its gradient: one tensor where all rows go on, and
    else those of `positions` [n]."""

    before: Tensor
    behind: Tensor
    positions: Tensor | None = None

    @property
    def rows(self) -> tuple[int, int]:
        return self.before.shape[1], self.behind.shape[1]


def stream_of(x: Tensor, positions: Tensor | None) -> Stream:
    """From x [1, T, d], which stays as it is."""
    if positions is not None:
        return Stream(x, x.new_empty(1, len(positions), x.shape[2]), positions)
    y = x.clone()
    return Stream(y, y)


def gradient_of(dy: Tensor, rows: int, positions: Tensor | None) -> Stream:
    """From dy [1, n, d], which is overwritten."""
    return Stream(dy, dy) if positions is None else Stream(dy.new_empty(1, rows, dy.shape[2]), dy, positions)


class Places(NamedTuple):
    """Of a layer's pass over some rows, in bytes: where in a block each of what is kept stands (x rounded and its
    norm's numbers before either half, q k v, the attention's output, lse, gate and up, the numbers of queries' and of
    keys' norms) and ends; and how large the memory is that it has for a moment, as decoder.c
    has it."""

    kept: tuple[int, ...]
    kept_end: int
    back: int
    on: int
    room: int
    h: int


@lru_cache(maxsize=64)
def places_of(rows: int, on: int, narrowed: bool, d: int, f: int, heads: Heads, normed: bool) -> Places:
    """Of a pass over so many rows, of which `on` go on behind the attention; `normed`: heads have norms. Kept, because
    all layers of a pass are alike."""
    own, others = heads.queries * heads.size, heads.keys * heads.size
    sizes = [2 * d * rows, 2 * d * on, 4 * rows, 4 * on, 2 * heads.width * rows, 2 * own * rows]
    sizes += [4 * heads.queries * rows, 4 * f * on]
    sizes += [4 * rows * count if normed else 0 for count in (heads.queries, heads.keys)]
    *kept, kept_end = _one_behind_another(sizes)
    rooms = max(d, own), max(d, heads.width), max(d, f, own), max(f, others, own * narrowed)
    return Places(tuple(kept), kept_end, *(_in_lines(2 * rows * size) for size in rooms))


class Rooms(NamedTuple):
    """A layer's memory for a moment, by address; the last is that of every G. `tensors` hold it."""

    back: int
    on: int
    room: int
    h: int
    slopes: int
    tensors: tuple[Tensor, ...]


def rooms_of(x: Tensor, places: Places, slopes: int) -> Rooms:
    back, on = handback_empty(x, places.back, dtype=torch.uint8), handoff_empty(x, places.on, dtype=torch.uint8)
    own = scratch_empty(x, places.room + places.h + slopes, dtype=torch.uint8)
    room = own.data_ptr()
    h = room + places.room
    return Rooms(back.data_ptr(), on.data_ptr(), room, h, h + places.h, (back, on, own))


def rows_of_terms(terms: Sequence[Placed], start: int = 0) -> tuple[list[int], int]:
    """Where [rows, r] of each term stands, in 16 bits, and where they end."""
    sizes = [2 * (term.stop - term.start) * term.a.shape[0] for term, _ in terms]
    *places, end = _one_behind_another(sizes, start)
    return places, end


def _one_behind_another(sizes: Sequence[int], start: int = 0) -> list[int]:
    """Where each begins, and the end."""
    return list(accumulate(map(_in_lines, sizes), initial=start))


def _in_lines(size: int) -> int:
    """Bytes up to a whole cache line."""
    return -(-size // 64) * 64
