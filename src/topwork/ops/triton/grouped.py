"""Many small products on the GPU in one launch over a table of them; formula and contract: `ops/grouped.py`.

A program makes one tile of one product: it finds the product by its tiles' numbers in the table. Products of one launch
have the same types and the same contiguous axes, so that these are known when it is compiled; the products of a stage
of LoRA do, and others take a launch for each kind. fp32 is multiplied as fp32, not as TF32; fp32 beside 16 bits (an
adapter's masters) is rounded to these as it is read.

A product of which neither operand is turned to the axis that is summed sums over the rows of a batch (the gradients of
A and B): over so many that each of a few tiles would work long while most of the GPU had nothing to do. It is cut into
pieces of `PIECE` rows, whose fp32 sums a second launch adds up in their order. Where it is cut depends on nothing but
the number of its rows.
"""
# mypy: allow-untyped-defs
# Triton reads a kernel's annotations itself: only `tl.constexpr` may stand there.

import struct
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from topwork.ops.grouped import Product
from topwork.ops.host import sent

LINE = tl.constexpr(12)
"""Numbers of a product in the table: first tile; tiles across; addresses of left, right and out; the distance of each
one's rows or, where it is turned, columns, in values; m and n packed by two; k; the bits of alpha; pieces."""
PIECE = tl.constexpr(2048)
"""Rows of a batch that one program sums."""
ADDED = 1024
"""Values of a product whose pieces one program adds."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The interpreter multiplies the bits of bf16 as whole numbers: it is given fp32."""


@triton.jit
def _line_of(table, count, tile, SEARCH: tl.constexpr):
    """The line of the last product whose first tile is not beyond this one."""
    low = tile * 0
    high = low + count
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        after = tl.load(table + middle * LINE) <= tile
        low = tl.where(after, middle, low)
        high = tl.where(after, high, middle)
    return table + low * LINE


@triton.jit
def _size_and_factor(line):
    """m, n and alpha."""
    packed = tl.load(line + 8)
    m, n = (packed >> 32).to(tl.int32), (packed & 0x7FFFFFFF).to(tl.int32)
    return m, n, tl.load(line + 10).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _tile_at(address, outer, rows, columns, height, width, TYPE: tl.constexpr, TURNED: tl.constexpr,
             ALIGNED: tl.constexpr):  # fmt: skip
    """Pointers of a tile and which of them lie inside a matrix [height, width]."""
    values = address.to(tl.pointer_type(TYPE))
    if ALIGNED:  # so that the compiler knows: a hint would be lost with the function's arguments
        values = tl.multiple_of(values, 16)
        outer = outer // 8 * 8
        if TURNED:  # the contiguous axis ends at a multiple too: else its mask would split every access
            height = height // 8 * 8
        else:
            width = width // 8 * 8
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    if TURNED:
        at = values + columns.to(tl.int64)[None, :] * outer + rows[:, None]
    else:
        at = values + rows.to(tl.int64)[:, None] * outer + columns[None, :]
    return at, inside


@triton.jit
def _grouped_products(
    table, count,
    TYPE: tl.constexpr, RIGHT_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr, OUT_TYPE: tl.constexpr,
    LEFT_TURNED: tl.constexpr, RIGHT_TURNED: tl.constexpr, OUT_TURNED: tl.constexpr, ADD: tl.constexpr,
    CUT: tl.constexpr, ALIGNED: tl.constexpr, SEARCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """With CUT, `out` is fp32 [pieces, m, n], and a program sums the steps of one piece."""
    tile = tl.program_id(0).to(tl.int64)
    line = _line_of(table, count, tile, SEARCH)
    tile -= tl.load(line)
    m, n, alpha = _size_and_factor(line)
    first, stop = 0, tl.load(line + 9).to(tl.int32)
    left, right, out = tl.load(line + 2), tl.load(line + 3), tl.load(line + 4)
    if CUT:
        pieces = tl.load(line + 11)
        out += (tile % pieces) * m * n * 4
        first = (tile % pieces).to(tl.int32) * PIECE
        stop = tl.minimum(stop, first + PIECE)
        tile = tile // pieces
    across = tl.load(line + 1)
    rows = ((tile // across) * ROWS).to(tl.int32) + tl.arange(0, ROWS)
    columns = ((tile % across) * COLUMNS).to(tl.int32) + tl.arange(0, COLUMNS)

    left_outer, right_outer, out_outer = tl.load(line + 5), tl.load(line + 6), tl.load(line + 7)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, stop, STEPS):
        steps = start + tl.arange(0, STEPS)
        at, inside = _tile_at(left, left_outer, rows, steps, m, stop, TYPE, LEFT_TURNED, ALIGNED)
        a = tl.load(at, mask=inside, other=0.0)
        at, inside = _tile_at(right, right_outer, steps, columns, stop, n, RIGHT_TYPE, RIGHT_TURNED, ALIGNED)
        b = tl.load(at, mask=inside, other=0.0).to(TYPE)
        sums = tl.dot(a.to(DOT_TYPE), b.to(DOT_TYPE), sums, input_precision="ieee")

    at, inside = _tile_at(out, out_outer, rows, columns, m, n, OUT_TYPE, OUT_TURNED, ALIGNED)
    if not CUT:
        sums *= alpha
    if ADD:
        sums += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, sums.to(OUT_TYPE), mask=inside)


@triton.jit
def _pieces_added(
    table, count, OUT_TYPE: tl.constexpr, OUT_TURNED: tl.constexpr, ADD: tl.constexpr, SEARCH: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """out [m, n] = alpha times the sum over fp32 [pieces, m, n] at `left`, and with ADD what it held."""
    tile = tl.program_id(0).to(tl.int64)
    line = _line_of(table, count, tile, SEARCH)
    m, n, alpha = _size_and_factor(line)
    size = m.to(tl.int64) * n
    at = (tile - tl.load(line)) * VALUES + tl.arange(0, VALUES)
    inside = at < size
    parts = tl.load(line + 2).to(tl.pointer_type(tl.float32)) + at
    sums = tl.zeros([VALUES], tl.float32)
    for piece in range(0, tl.load(line + 11)):
        sums += tl.load(parts + piece * size, mask=inside, other=0.0)
    sums *= alpha
    row, column, outer = at // n, at % n, tl.load(line + 7)
    place = column * outer + row if OUT_TURNED else row * outer + column
    out = tl.load(line + 4).to(tl.pointer_type(OUT_TYPE)) + place
    if ADD:
        sums += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, sums.to(OUT_TYPE), mask=inside)


class Kind(NamedTuple):
    """What the products of a launch have in common; turned is what is contiguous along its columns."""

    left: torch.dtype
    right: torch.dtype
    out: torch.dtype
    left_turned: bool
    right_turned: bool
    out_turned: bool
    beta: int
    cut: bool


def grouped_products(products: Sequence[Product]) -> None:
    """Every product's `out`; checked by the caller. Views without a contiguous axis are copied, as out is."""
    kinds: dict[Kind, list[Product]] = defaultdict(list)
    copied: list[tuple[Tensor, Tensor]] = []
    for product in products:
        left, right, out, alpha, beta = product
        if not out.numel():
            continue
        left, right = (x if 1 in x.stride() else x.contiguous() for x in (left, right))
        if out.stride(1) != 1:
            copied.append((out, out.contiguous()))
            out = copied[-1][1]
        if _turned(left) and not _turned(right) and left.shape[0] > right.shape[1] and left.dtype == right.dtype:
            left, right, out = right.t(), left.t(), out.t()  # the longer side across, whose tiles are wider
        turned = _turned(left), _turned(right), _turned(out)
        cut = turned[:2] == (True, False) and left.shape[1] > PIECE.value
        kinds[Kind(left.dtype, right.dtype, out.dtype, *turned, beta, cut)].append(
            Product(left, right, out, alpha, beta)
        )
    for kind, alike in kinds.items():
        _launch(kind, alike)
    for target, result in copied:
        target.copy_(result)


def tile_of(products: Sequence[Product]) -> tuple[int, int, int]:
    """Rows, columns and steps of a launch's tiles: of the largest product, within what registers hold."""
    tall, wide = (max(product.out.shape[axis] for product in products) for axis in (0, 1))
    deep = max(product.left.shape[1] for product in products)
    rows, columns = (min(64, max(16, triton.next_power_of_2(x))) for x in (tall, wide))
    return rows, columns, min(64, max(16, triton.next_power_of_2(deep)))


def _launch(kind: Kind, products: Sequence[Product]) -> None:
    rows, columns, steps = tile_of(products)
    pieces = [triton.cdiv(product.left.shape[1], PIECE.value) if kind.cut else 1 for product in products]
    held, parts = _parts(products, pieces) if kind.cut else (None, [])
    lines, added = [], []
    tiles = adds = 0
    for number, (left, right, out, alpha, _) in enumerate(products):
        (m, k), n = left.shape, right.shape[1]
        across, size = triton.cdiv(n, columns), (m << 32) | n
        outers = [_outer(x) for x in (left, right, out)]
        addresses = [x.data_ptr() for x in (left, right, out)]
        rest = [size, k, _bits(alpha), pieces[number]]
        if kind.cut:
            added.append([adds, 0, parts[number], 0, addresses[2], 0, 0, outers[2], *rest])
            adds += triton.cdiv(m * n, ADDED)
            addresses[2], outers[2] = parts[number], n
        lines.append([tiles, across, *addresses, *outers, *rest])
        tiles += triton.cdiv(m, rows) * across * pieces[number]
    first = products[0].out
    table = sent(torch.tensor(lines + added, dtype=torch.int64), first.device)
    count, out_type = len(products), TYPES[first.dtype]
    search = count.bit_length()
    with torch.cuda.device_of(first):
        _grouped_products[(tiles,)](
            table, count,
            TYPE=TYPES[kind.left], RIGHT_TYPE=TYPES[kind.right],
            DOT_TYPE=tl.float32 if INTERPRETED else TYPES[kind.left], OUT_TYPE=tl.float32 if kind.cut else out_type,
            LEFT_TURNED=kind.left_turned, RIGHT_TURNED=kind.right_turned, OUT_TURNED=kind.out_turned and not kind.cut,
            ADD=bool(kind.beta) and not kind.cut, CUT=kind.cut, ALIGNED=_aligned(lines, kind), SEARCH=search,
            ROWS=rows, COLUMNS=columns, STEPS=steps, num_warps=4,
        )  # fmt: skip
        if kind.cut:
            _pieces_added[(adds,)](
                table[count:], count, OUT_TYPE=out_type, OUT_TURNED=kind.out_turned, ADD=bool(kind.beta),
                SEARCH=search, VALUES=ADDED, num_warps=4,
            )  # fmt: skip
    del held  # it had to last until here


def _turned(x: Tensor) -> bool:
    return x.stride(1) != 1


def _outer(x: Tensor) -> int:
    """From one row to the next or, where it is turned, from one column."""
    return x.stride(1) if _turned(x) else x.stride(0)


def _parts(products: Sequence[Product], pieces: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Memory for the pieces' sums, and the address of each product's."""
    ends = list(accumulate(count * product.out.numel() for product, count in zip(products, pieces)))
    held = products[0].out.new_empty(ends[-1], dtype=torch.float32)
    return held, [held.data_ptr() + 4 * start for start in (0, *ends[:-1])]


def _bits(alpha: float) -> int:
    """Of the fp32 number."""
    return int(struct.unpack("<i", struct.pack("<f", alpha))[0])


def _aligned(lines: Sequence[Sequence[int]], kind: Kind) -> bool:
    """Whether rows begin at multiples of 16 bytes and end at multiples of eight values."""
    ends = set()
    for _, _, left, right, out, *outers, size, k, _, _ in lines:
        m, n = size >> 32, size & 0x7FFFFFFF
        ends |= {m if kind.left_turned else k, k if kind.right_turned else n}
        ends.add(m if kind.out_turned and not kind.cut else n)
        if any(at % 16 for at in (left, right, out)) or any(outer % 8 for outer in outers):
            return False
    return all(end % 8 == 0 for end in ends)
