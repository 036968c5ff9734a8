"""Many small products on the GPU in one launch over a table of them; formula and contract: `ops/grouped.py`,
kernels: `grouped_kernels.py`.

A program makes one tile of one product: it finds the product by its tiles' numbers in the table. Products of one launch
have the same types and the same contiguous axes, so that these are known when it is compiled; the products of a stage
of LoRA do, and others take a launch for each kind. fp32 is multiplied as fp32, not as TF32; fp32 beside 16 bits (an
adapter's masters) is rounded to these as it is read.

A product of which neither operand is contiguous along the axis that is summed sums over the rows of a batch (the
gradients of A and B): over so many that each of a few tiles would work long while most of the GPU had nothing to do. It
is cut into pieces, whose fp32 sums a second launch adds up in their order. Where it is cut depends on nothing but the
number of its rows.
"""

import struct
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from topwork.ops.grouped import Product
from topwork.ops.host import sent
from topwork.ops.triton.grouped_kernels import add_pieces, multiply_grouped
from topwork.ops.triton.sizes import cdiv, power_of_2
from topwork.ops.triton.types import TYPES, dot_type

PIECE, PIECES = 1024, 8
"""Rows of a batch that one program sums, at the least; pieces of a product, at the most: they take memory."""
ADDED = 1024
"""Values of a product whose pieces one program adds."""

Line = tuple[int, ...]
Launch = Callable[[Tensor], None]


class Planned(NamedTuple):
    """A stage: its launches from the tables; what has to last until they are made, since these know addresses alone;
    and what is to be copied to where it belongs."""

    launches: list[Launch]
    products: Sequence[Product]
    held: list[Tensor]
    copied: list[tuple[Tensor, Tensor]]


class Kind(NamedTuple):
    """What the products of a launch have in common; turned is what is contiguous along its columns."""

    left: torch.dtype
    right: torch.dtype
    out: torch.dtype
    left_turned: bool
    right_turned: bool
    out_turned: bool
    beta: int

    @property
    def cut(self) -> bool:
        return self.left_turned and not self.right_turned


class Place(NamedTuple):
    """A matrix in memory: its address, whether it is turned, and the distance from row to row or, turned, column to
    column."""

    at: int
    turned: bool
    outer: int

    def other_way(self) -> "Place":
        return Place(self.at, not self.turned, self.outer)


class Job(NamedTuple):
    """A product as numbers."""

    left: Place
    right: Place
    out: Place
    m: int
    n: int
    k: int
    alpha: float


def staged(stages: Sequence[Sequence[Product]]) -> list[Callable[[], None]]:
    """What launches each stage, to be called in their order; checked by the caller. Every launch's table goes over in
    one copy, now. Views without a contiguous axis are copied now too, `out` when its stage is over."""
    lines: list[Line] = []
    planned = [_planned(stage, lines) for stage in stages]
    devices = [product.out.device for stage in stages for product in stage]
    tables = sent(torch.tensor(lines, dtype=torch.int64), devices[0]) if lines else None
    return [partial(_run, stage, tables) for stage in planned]


def _planned(products: Sequence[Product], lines: list[Line]) -> Planned:
    """A stage; its tables are put behind the others."""
    kinds: dict[Kind, list[Job]] = defaultdict(list)
    held: list[Tensor] = []
    copied: list[tuple[Tensor, Tensor]] = []
    for product in products:
        (m, k), n = product.left.shape, product.right.shape[1]
        if not (m and n):
            continue
        if (out := product.out).stride(1) != 1:
            copied.append((out, out.contiguous()))
            out = copied[-1][1]
        left, right = _place(product.left, held), _place(product.right, held)
        job = Job(left, right, Place(out.data_ptr(), False, out.stride(0)), m, n, k, product.alpha)
        types = product.left.dtype, product.right.dtype
        if left.turned and not right.turned and m > n and types[0] == types[1]:
            job = _turned(job)
        cut = job.left.turned and not job.right.turned
        turned = job.left.turned, job.right.turned, job.out.turned and not cut
        kinds[Kind(*types, out.dtype, *turned, product.beta)].append(job)
    launches = [_launch(kind, alike, lines, products[0].out, held) for kind, alike in kinds.items()]
    return Planned(launches, products, held, copied)


def _run(stage: Planned, tables: Tensor | None) -> None:
    if tables is not None:
        with torch.cuda.device_of(tables):
            for launch in stage.launches:
                launch(tables)
    for target, result in stage.copied:
        target.copy_(result)


def _place(x: Tensor, held: list[Tensor]) -> Place:
    """Where x is, or a copy that has a contiguous axis, and is held."""
    row, column = x.stride()
    if column == 1:
        return Place(x.data_ptr(), False, row)
    if row == 1:
        return Place(x.data_ptr(), True, column)
    held.append(x.contiguous())
    return _place(held[-1], held)


def _turned(job: Job) -> Job:
    """The same product with its longer side across, whose tiles are wider."""
    left, right, out, m, n, k, alpha = job
    return Job(right.other_way(), left.other_way(), out.other_way(), n, m, k, alpha)


def tile_of(jobs: Sequence[Job]) -> tuple[int, int, int]:
    """Rows, columns and steps of a launch's tiles: of the largest product, within what registers hold."""
    largest = max(job.m for job in jobs), max(job.n for job in jobs), max(job.k for job in jobs)
    rows, columns, steps = (min(64, max(16, power_of_2(x))) for x in largest)
    return rows, columns, steps


def _launch(kind: Kind, jobs: Sequence[Job], lines: list[Line], near: Tensor, held: list[Tensor]) -> Launch:
    """A launch from the tables that hold its lines, which are put there; with pieces two."""
    rows, columns, steps = tile_of(jobs)
    added: list[Line] = []
    first, tiles, adds = len(lines), 0, 0
    pieces, length, parts_at = 1, 0, 0
    if kind.cut:
        sizes = [job.m * job.n * pieces_of(job.k)[0] for job in jobs]
        held.append(near.new_empty(sum(sizes), dtype=torch.float32))
        parts_at = held[-1].data_ptr()
    for job in jobs:
        left, right, out, m, n, k, alpha = job
        at, outer = out.at, out.outer
        if kind.cut:
            pieces, length = pieces_of(k)
            strides = (1, outer) if out.turned else (outer, 1)
            added.append(
                (adds, 0, parts_at, 0, at, *strides, 0, (m << 32) | n, k, _bits(alpha), (length << 32) | pieces)
            )
            adds += cdiv(m * n, ADDED)
            at, outer = parts_at, n
            parts_at += 4 * m * n * pieces
        across = cdiv(n, columns)
        outers = left.outer, right.outer, outer
        lines.append(
            (tiles, across, left.at, right.at, at, *outers, (m << 32) | n, k, _bits(alpha), (length << 32) | pieces)
        )
        tiles += cdiv(m, rows) * across * pieces
    lines += added
    count, left_type, out_type = len(jobs), TYPES[kind.left], TYPES[kind.out]
    search, aligned = count.bit_length(), _aligned(kind, jobs)

    def launch(tables: Tensor) -> None:
        if tiles:
            multiply_grouped[(tiles,)](
                tables[first:], count, TYPE=left_type, RIGHT_TYPE=TYPES[kind.right],
                DOT_TYPE=dot_type(kind.left), OUT_TYPE=tl.float32 if kind.cut else out_type,
                LEFT_TURNED=kind.left_turned, RIGHT_TURNED=kind.right_turned, OUT_TURNED=kind.out_turned,
                ADD=bool(kind.beta) and not kind.cut, CUT=kind.cut, ALIGNED=aligned, SEARCH=search, ROWS=rows,
                COLUMNS=columns, STEPS=steps, num_warps=4,
            )  # fmt: skip
        if kind.cut:
            add_pieces[(adds,)](
                tables[first + count :], count, OUT_TYPE=out_type, ADD=bool(kind.beta), SEARCH=search, VALUES=ADDED,
                num_warps=4,
            )  # fmt: skip

    return launch


def pieces_of(k: int) -> tuple[int, int]:
    """How many pieces a sum over k rows has, and the rows of one."""
    length = max(PIECE, cdiv(cdiv(k, PIECES), 64) * 64)
    return cdiv(k, length), length


def _bits(alpha: float) -> int:
    """Of the fp32 number."""
    return int.from_bytes(struct.pack("<f", alpha), "little", signed=True)


def _aligned(kind: Kind, jobs: Sequence[Job]) -> bool:
    """Whether rows begin at multiples of 16 bytes, and end at multiples of eight values."""
    for (left, _, a), (right, _, b), (out, _, c), m, n, k, _ in jobs:
        ends = (m if kind.left_turned else k) | (k if kind.right_turned else n) | (m if kind.out_turned else n)
        if (left | right | out) % 16 or (a | b | c | ends) % 8:
            return False
    return True
