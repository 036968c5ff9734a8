"""Vectors that learn, times or added to rows of values, and their gradients, on the GPU; formulas, symbols and the
truth: `ops/gain.py`.

All of these wait for memory alone. A program holds a tile of 2,048 values, 16 to a thread in pieces of 16 bytes, and
reads what belongs to its columns once. Sums over rows are made twice: each program goes down a block of rows, and a
second launch adds the blocks up, in an order that depends on the shape alone; there are as many blocks as fill a large
GPU and no more. Arithmetic is fp32 and rounds where the truth does. Offsets are 64 bits wide from the row on. How many
rows there are is not compiled in (`triton/layer.py`).
"""
# mypy: allow-untyped-defs
# Triton reads a kernel's annotations itself: only `tl.constexpr` may stand there.

import torch
import triton
import triton.language as tl
from torch import Tensor

from topwork.ops.triton.sizes import cdiv, power_of_2

TILE = 2048
"""Values to a program at a time. Never fewer than its threads: then no value is read by one after another wrote it."""
WIDEST = 256
"""Columns of a tile."""
BLOCKS = 256
"""The most blocks of rows: eight programs to a multiprocessor with four chunks of columns."""
TOTAL_ROWS, TOTAL_COLUMNS = 64, 32
"""The tile that adds blocks up."""
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _place(chunks, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first tile's rows of a program, its columns, and which of these there are."""
    row = (tl.program_id(0) // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % chunks) * COLUMNS + tl.arange(0, COLUMNS)
    return row, column, column < n


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    z, z_row, factor, left_alone, rows, n, chunks, LEAVES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column, inside = _place(chunks, n, ROWS, COLUMNS)
    keep = (row < rows)[:, None] & inside[None, :]
    at = z + row[:, None] * z_row + column[None, :]
    times = tl.load(factor + column, mask=inside, other=0.0)
    value = tl.load(at, mask=keep, other=0.0).to(tl.float32) * times[None, :]
    if LEAVES:
        value -= (tl.load(left_alone + column, mask=inside, other=0.0).to(tl.float32) * (times - 1.0))[None, :]
    tl.store(at, value.to(z.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows"])
def _add(z, z_row, amount, rows, n, chunks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, inside = _place(chunks, n, ROWS, COLUMNS)
    keep = (row < rows)[:, None] & inside[None, :]
    at = z + row[:, None] * z_row + column[None, :]
    value = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    value += tl.load(amount + column, mask=inside, other=0.0)[None, :]
    tl.store(at, value.to(z.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows", "block"])
def _gain_sums(
    y, y_row, dy, dy_row, dz, dz_row, factor, left_alone, sums, rows, n, chunks, block,
    LEAVES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program makes a row of `sums` [blocks, n] of its columns. dz may be y or dy: a tile is read, then written."""
    number = (tl.program_id(0) // chunks).to(tl.int64)
    column = (tl.program_id(0) % chunks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    times = tl.load(factor + column, mask=inside, other=0.0)[None, :]
    if LEAVES:
        beside = tl.load(left_alone + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, block, ROWS):
        row = number * block + start + tl.arange(0, ROWS)
        keep = (row < rows)[:, None] & inside[None, :]
        slope = tl.load(dy + row[:, None] * dy_row + column[None, :], mask=keep, other=0.0).to(tl.float32)
        value = tl.load(y + row[:, None] * y_row + column[None, :], mask=keep, other=0.0).to(tl.float32)
        if LEAVES:
            value -= beside
        total += slope * value
        at = dz + row[:, None] * dz_row + column[None, :]
        tl.store(at, (slope * times).to(dz.dtype.element_ty), mask=keep)
    tl.store(sums + number * n + column, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["rows", "block"])
def _column_sums(dy, dy_row, sums, rows, n, chunks, block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    number = (tl.program_id(0) // chunks).to(tl.int64)
    column = (tl.program_id(0) % chunks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, block, ROWS):
        row = number * block + start + tl.arange(0, ROWS)
        keep = (row < rows)[:, None] & inside[None, :]
        total += tl.load(dy + row[:, None] * dy_row + column[None, :], mask=keep, other=0.0).to(tl.float32)
    tl.store(sums + number * n + column, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["blocks"])
def _total(sums, factor, out, blocks, n, DIVIDES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The blocks' sum; with DIVIDES over the factor, and zero where that is zero."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, blocks, ROWS):
        row = start + tl.arange(0, ROWS)
        keep = (row < blocks)[:, None] & inside[None, :]
        total += tl.load(sums + row[:, None] * n + column[None, :], mask=keep, other=0.0)
    found = tl.sum(total, 0)
    if DIVIDES:
        by = tl.load(factor + column, mask=inside, other=1.0)
        found = tl.where(by == 0.0, 0.0, tl.div_rn(found, tl.where(by == 0.0, 1.0, by)))
    tl.store(out + column, found, mask=inside)


def multiply_(z: Tensor, factor: Tensor, left_alone: Tensor | None) -> None:
    """z [T, n], its rows contiguous, becomes y."""
    factor, beside = factor.contiguous(), factor if left_alone is None else left_alone.contiguous()
    (rows, n), (held, width) = z.shape, tile_of(z.shape[1])
    chunks = cdiv(n, width)
    if z.numel():
        with torch.cuda.device_of(z):
            _multiply[(cdiv(rows, held) * chunks,)](
                z, z.stride(0), factor, beside, rows, n, chunks, LEAVES=left_alone is not None, ROWS=held,
                COLUMNS=width, **LAUNCH,
            )  # fmt: skip


def add_(z: Tensor, amount: Tensor) -> None:
    """z [T, n], its rows contiguous, gets `amount` on top."""
    (rows, n), (held, width) = z.shape, tile_of(z.shape[1])
    chunks = cdiv(n, width)
    if z.numel():
        with torch.cuda.device_of(z):
            _add[(cdiv(rows, held) * chunks,)](
                z, z.stride(0), amount.contiguous(), rows, n, chunks, ROWS=held, COLUMNS=width, **LAUNCH
            )


def gain_sums_(y: Tensor, dy: Tensor, factor: Tensor, left_alone: Tensor | None, dz: Tensor, divides: bool) -> Tensor:
    """Sums over rows of dy (y - b) [n], over the factor if it `divides`; fills dz [T, n]. Rows are contiguous."""
    factor, beside = factor.contiguous(), factor if left_alone is None else left_alone.contiguous()
    if not y.numel():
        return torch.zeros_like(factor)
    (rows, n), (held, width) = y.shape, tile_of(y.shape[1])
    chunks, block = cdiv(n, width), block_of(rows, held)
    sums = factor.new_empty(cdiv(rows, block), n)
    with torch.cuda.device_of(y):
        _gain_sums[(len(sums) * chunks,)](
            y, y.stride(0), dy, dy.stride(0), dz, dz.stride(0), factor, beside, sums, rows, n, chunks, block,
            LEAVES=left_alone is not None, ROWS=held, COLUMNS=width, **LAUNCH,
        )  # fmt: skip
        return _added_up(sums, factor if divides else None)


def column_sums(dy: Tensor) -> Tensor:
    """Sums over rows [n] in fp32 of dy [T, n], its rows contiguous."""
    if not dy.numel():
        return torch.zeros(dy.shape[1], device=dy.device)
    (rows, n), (held, width) = dy.shape, tile_of(dy.shape[1])
    chunks, block = cdiv(n, width), block_of(rows, held)
    sums = torch.empty(cdiv(rows, block), n, device=dy.device)
    with torch.cuda.device_of(dy):
        _column_sums[(len(sums) * chunks,)](
            dy, dy.stride(0), sums, rows, n, chunks, block, ROWS=held, COLUMNS=width, **LAUNCH
        )
        return _added_up(sums, None)


def tile_of(n: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    width = min(WIDEST, power_of_2(n))
    return TILE // width, width


def block_of(rows: int, held: int) -> int:
    """Rows of a block: whole tiles, and at the most `BLOCKS` blocks."""
    return cdiv(rows, held * BLOCKS) * held


def _added_up(sums: Tensor, factor: Tensor | None) -> Tensor:
    out = torch.empty(sums.shape[1], device=sums.device)
    _total[(cdiv(len(out), TOTAL_COLUMNS),)](
        sums, sums if factor is None else factor, out, len(sums), len(out), DIVIDES=factor is not None,
        ROWS=TOTAL_ROWS, COLUMNS=TOTAL_COLUMNS, **LAUNCH,
    )  # fmt: skip
    return out
