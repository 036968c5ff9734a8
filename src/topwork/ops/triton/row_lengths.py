"""Row lengths of W + s B A on the GPU in one launch; formula and symbols: `ops/row_lengths.py`.

A program has some rows, and goes through the r columns of B C in blocks. Products are fp32, not TF32.
"""
# mypy: allow-untyped-defs
# Triton reads a kernel's annotations itself: only `tl.constexpr` may stand there.

import torch
import triton
import triton.language as tl
from torch import Tensor

from topwork.ops.triton.sizes import cdiv, power_of_2

ROWS = 32
"""To a program."""
WIDEST = 64
"""Columns of B C that it has at a time."""


@triton.jit
def _row_lengths(
    squares, b, across, across_row, across_column, gram, lengths, outputs, scaling,
    R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < outputs
    total = tl.load(squares + row, mask=there, other=0.0)
    for start in range(0, R, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in range(0, R, COLUMNS):
            inner = step + tl.arange(0, COLUMNS)
            left = tl.load(b + row[:, None] * R + inner, mask=there[:, None] & (inner < R), other=0.0)
            right = tl.load(gram + inner[:, None] * R + column, mask=(inner < R)[:, None] & (column < R), other=0.0)
            product = tl.dot(left, right, product, input_precision="ieee")
        keep = there[:, None] & (column < R)
        own = tl.load(b + row[:, None] * R + column, mask=keep, other=0.0)
        at = across + row[:, None] * across_row + column * across_column
        other = tl.load(at, mask=keep, other=0.0).to(tl.float32)
        total += tl.sum(own * (2.0 * scaling * other + scaling * scaling * product), 1)
    length = tl.sqrt_rn(tl.maximum(total, 1.1754943508222875e-38))
    tl.store(lengths + row, length, mask=there)


def row_lengths(squares: Tensor, b: Tensor, across: Tensor, gram: Tensor, scaling: float) -> Tensor:
    """n [out] fp32; across [out, r] of any strides, the others contiguous in fp32."""
    outputs, r = b.shape
    lengths = torch.empty_like(squares)
    if outputs:
        with torch.cuda.device_of(b):
            _row_lengths[(cdiv(outputs, ROWS),)](
                squares, b, across, *across.stride(), gram, lengths, outputs, scaling,
                R=r, ROWS=ROWS, COLUMNS=min(WIDEST, max(16, power_of_2(r))), num_warps=4,
            )  # fmt: skip
    return lengths
