"""Quantized weights on the GPU: one launch reads codes and constants and writes a dense panel.

The unit of work is a *group*: 32 values that begin at a multiple of 32 of the flat weight, 16 bytes of codes. The
smallest block has 32 values, so a group lies in one block and its constant (with double quantization made of its byte,
its nested constant and the offset) is made once and stays in registers. A group's values leave as 16-byte stores. The
sixteen values of the code and the 256 of the nested map are read through the cache: for a warp they are one or a few
lines. Memory moved for each parameter: 2 bytes written (16-bit), 0.52 read.

Rounding is the truth's (`ops/quantize.py`): a product, a sum, a product, each rounded to fp32, then once to the output.
Compilers fuse a product and a sum into one rounding unless told not to: every launch says that it may not
(tests/ops/test_triton_dequantize.py reads the compiled code). Symbols: `ops/packed.py`.
"""
# mypy: allow-untyped-defs
# Triton reads a kernel's annotations itself: only `tl.constexpr` may stand there.

import torch
import triton
import triton.language as tl
from torch import Tensor

from topwork.ops.triton.sizes import cdiv

GROUP = tl.constexpr(32)
"""Values a group holds: the smallest block bitsandbytes knows."""
GROUPS = 64
"""Groups to a program: 1 KiB of codes, 8 bytes to a thread."""
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
"""Options of every launch."""
INT8_COLUMNS = 2048
"""Values of one row to a program."""


@triton.jit
def _block_constants(blocks, inside, absmax, nested_absmax, nested_code, offset, NESTED: tl.constexpr):
    """The constants [groups] fp32 of some blocks."""
    if NESTED:
        byte = tl.load(absmax + blocks, mask=inside, other=0)
        scale = tl.load(nested_absmax + blocks // 256, mask=inside, other=0.0)
        constants = tl.load(nested_code + byte.to(tl.int32)) * scale + offset
    else:
        constants = tl.load(absmax + blocks, mask=inside, other=0.0)
    return constants


@triton.jit
def _unpack_4bit(
    codes, absmax, nested_absmax, nested_code, offset, code, out,
    code_bytes, start, in_features, columns, groups_a_row, groups,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """out [rows, columns]; its first value is value `start` of the flat weight. `groups` are all rows' groups."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    row = (group // groups_a_row).to(tl.int64)
    row_start = row * in_features + start
    base = (row_start // GROUP + group % groups_a_row) * GROUP
    before = base - row_start  # of the group's first value in its row of the panel; negative where the row starts later
    inside = (group < groups) & (before < columns)
    constant = _block_constants(base // BLOCK, inside, absmax, nested_absmax, nested_code, offset, NESTED)

    at = (base // 2)[:, None] + tl.arange(0, GROUP // 2)[None, :]
    byte = tl.load(codes + at, mask=inside[:, None] & (at < code_bytes), other=0).to(tl.int32)
    nibbles = tl.interleave(byte >> 4, byte & 15)
    value = tl.load(code + nibbles) * constant[:, None]

    column = before[:, None] + tl.arange(0, GROUP)[None, :]
    keep = inside[:, None] & (column >= 0) & (column < columns)
    tl.store(out + (row * columns)[:, None] + column, value.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _unpack_int8(codes, absmax, out, row, column, in_features, columns, chunks, COLUMNS: tl.constexpr):
    """out [rows, columns] = code * absmax / 127, a program for each `COLUMNS` values of a row."""
    program = tl.program_id(0)
    at = (program // chunks).to(tl.int64)
    here = (program % chunks) * COLUMNS + tl.arange(0, COLUMNS)
    keep = here < columns
    value = tl.load(codes + (at + row) * in_features + column + here, mask=keep, other=0).to(tl.float32)
    value = value * tl.load(absmax + at + row) * 7.874015718698502e-3
    tl.store(out + at * columns + here, value.to(out.dtype.element_ty), mask=keep)


def unpack_4bit(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: float,
    code: Tensor, block_size: int, in_features: int, row: int, column: int, out: Tensor,
) -> None:  # fmt: skip
    """Fill out [rows, columns] with the panel that begins at (row, column). The caller has checked that it lies in the
    weight, that all is contiguous and of the types in `Packed4bit`; code [16] fp32 is the type's."""
    rows, columns = out.shape
    start = row * in_features + column
    if columns == in_features:  # whole rows are one long one, whatever its length
        rows, columns = 1, rows * columns
    aligned = start % 32 == 0 and (rows == 1 or in_features % 32 == 0)
    groups_a_row = cdiv(columns + (0 if aligned else 31), 32)
    groups = rows * groups_a_row
    if columns == 0 or groups == 0:
        return
    nested = nested_absmax is not None and nested_code is not None
    with torch.cuda.device_of(codes):
        _unpack_4bit[(cdiv(groups, GROUPS),)](
            codes, absmax, nested_absmax if nested else absmax, nested_code if nested else absmax, offset, code, out,
            codes.numel(), start, in_features, columns, groups_a_row, groups,
            BLOCK=block_size, NESTED=nested, GROUPS=GROUPS, **LAUNCH,
        )  # fmt: skip


def unpack_int8(codes: Tensor, absmax: Tensor, row: int, column: int, out: Tensor) -> None:
    """Fill out [rows, columns] with the panel that begins at (row, column) of codes [out, in] int8, absmax [out]."""
    rows, columns = out.shape
    if out.numel() == 0:
        return
    chunks = cdiv(columns, INT8_COLUMNS)
    with torch.cuda.device_of(codes):
        _unpack_int8[(rows * chunks,)](
            codes, absmax, out, row, column, codes.shape[1], columns, chunks,
            COLUMNS=INT8_COLUMNS, **LAUNCH,
        )  # fmt: skip
