"""Packing weights into 4 and 8 bits, unpacking panels of them: plain torch (the truth), C on the CPU, Triton on CUDA.

Formats and symbols: `ops/packed.py`. Everything here equals bitsandbytes bit for bit, its rounding of ties and of the
last, shorter block included (tests/ops/test_quantize.py).
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch import library as registry

from topwork.ops.context import scratch_empty
from topwork.ops.native import load as native
from topwork.ops.triton import load as triton

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
    0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
)  # fmt: skip
CODES = {"nf4": NF4, "fp4": FP4}
"""What each nibble stands for, times the block's constant."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The block sizes that bitsandbytes reads."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
AT_ONCE = 1 << 18
"""Values quantized at a time: what a large weight needs beside itself stays small, and leaves no holes behind."""

_SMALLEST = 1e-38
_BY_127 = 7.874015718698502e-3


def code_of(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """The sixteen values [16] fp32 of a 4-bit type. Raises ValueError naming the types there are."""
    if quant_type not in CODES:
        raise ValueError(f"unknown 4-bit type {quant_type!r}, expected {' or '.join(CODES)}")
    return torch.tensor(CODES[quant_type], device=device)


def quantize_4bit(weight: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """A tensor of any shape -> codes [ceil(n / 2)] uint8 and block constants [ceil(n / block_size)] fp32."""
    code = code_of(quant_type)
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block size {block_size} cannot be read by bitsandbytes; expected one of {BLOCK_SIZES}")
    if weight.dtype not in FLOATS:
        raise ValueError(f"a weight of type {weight.dtype} cannot be quantized, expected a 16- or 32-bit float")
    order = torch.argsort(code, stable=True)
    bounds = (code[order[:-1]] + code[order[1:]]) / 2
    flat = weight.reshape(-1)
    codes = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-flat.numel() // block_size), device=weight.device)
    for start in range(0, flat.numel(), AT_ONCE):
        part = flat[start : start + AT_ONCE].float()
        found = _quantize_part(part, bounds, order.to(torch.uint8), block_size)
        for whole, values, first in zip((codes, absmax), found, (start // 2, start // block_size)):
            whole[first : first + len(values)] = values
    if not torch.isfinite(absmax).all():
        raise ValueError("the weight holds NaN or infinity and cannot be quantized")
    return codes, absmax


def _quantize_part(values: Tensor, bounds: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    library = native.compiled("quantize4") if values.is_cpu else None
    if library is None:
        return quantize_4bit_reference(values, bounds, order, block_size)
    values = values.contiguous()
    count = values.numel()
    codes = torch.empty((count + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-count // block_size))
    library.topwork_quantize_4bit(
        values.data_ptr(), count, block_size, bounds.data_ptr(), order.data_ptr(), codes.data_ptr(), absmax.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, absmax


def quantize_4bit_reference(values: Tensor, bounds: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The truth for flat fp32 values: each is scaled by its block's largest magnitude and goes to the nearest code, a
    tie to the lower one. A whole block is multiplied by the reciprocal, a shorter last one divided, as bitsandbytes
    does it."""
    whole = values.numel() // block_size * block_size
    blocks = values[:whole].view(-1, block_size)
    absmax = blocks.abs().amax(-1) if whole else values.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST))[:, None]).flatten()
    if whole < values.numel():
        largest = values[whole:].abs().max().clamp(min=_SMALLEST)
        absmax = torch.cat([absmax, largest[None]])
        scaled = torch.cat([scaled, values[whole:] / largest])
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    nibbles = order.to(values.device)[torch.bucketize(scaled, bounds.to(values.device))]
    return nibbles[::2] << 4 | nibbles[1::2], absmax


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> codes [out, in] int8 and each row's largest magnitude [out] fp32, computed in fp16 as bitsandbytes
    does. A row of zeros has zero codes."""
    if weight.dtype not in FLOATS:
        raise ValueError(f"a weight of type {weight.dtype} cannot be quantized, expected a 16- or 32-bit float")
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[0], device=weight.device)
    rows = max(1, AT_ONCE // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        half = weight[part].to(torch.float16)
        absmax[part] = half.abs().amax(1)
        factor = torch.where(absmax[part] > 0, 127.0 / absmax[part], torch.zeros_like(absmax[part]))
        codes[part] = (half * factor[:, None]).round_()
    if not torch.isfinite(absmax).all():
        raise ValueError("the weight holds NaN, infinity or values beyond float16 and cannot be quantized to int8")
    return codes, absmax


def dequantize_4bit_reference(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: float,
    quant_type: str, block_size: int, in_features: int, row: int, row_stop: int, column: int, column_stop: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The truth: rows [row, row_stop) and columns [column, column_stop) of the weight, in `dtype`. Raises IndexError
    for a panel that does not lie in the weight."""
    _check_bounds(codes.numel() * 2, in_features, row, row_stop, column, column_stop)
    rows = torch.arange(row, row_stop, device=codes.device)
    return rows_4bit(
        rows, slice(column, column_stop), codes, absmax, nested_absmax, nested_code, offset, quant_type, block_size,
        in_features, dtype,
    )  # fmt: skip


def rows_4bit(
    rows: Tensor, columns: slice, codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: float, quant_type: str, block_size: int, in_features: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Any rows [r] and some columns of the weight, value by value."""
    at = rows[:, None] * in_features + torch.arange(columns.start, columns.stop, device=codes.device)
    byte = codes.view(-1)[at // 2]
    nibble = torch.where(at % 2 == 0, byte >> 4, byte & 15)
    block = at // block_size
    constant = absmax[block]
    if nested_absmax is not None and nested_code is not None:
        constant = nested_code[constant.int()] * nested_absmax[block // 256] + offset
    return (code_of(quant_type, codes.device)[nibble.int()] * constant).to(dtype)


def dequantize_int8_reference(
    codes: Tensor, absmax: Tensor, row: int, row_stop: int, column: int, column_stop: int, dtype: torch.dtype
) -> Tensor:
    """The truth: code * absmax / 127, the division as bitsandbytes' product. Raises IndexError as above."""
    _check_bounds(codes.numel(), codes.shape[1], row, row_stop, column, column_stop)
    return (codes[row:row_stop, column:column_stop] * absmax[row:row_stop, None] * _BY_127).to(dtype)


def dequantize_4bit_cpu(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: float,
    quant_type: str, block_size: int, in_features: int, row: int, row_stop: int, column: int, column_stop: int,
    dtype: torch.dtype, into: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`dequantize_4bit` on a CPU, where it may be written to contiguous memory that is given."""
    library = native.compiled("quantize4")
    if library is None and triton.INTERPRETED:
        return _dequantize_4bit_cuda(
            codes, absmax, nested_absmax, nested_code, offset, quant_type, block_size, in_features,
            row, row_stop, column, column_stop, dtype,
        )  # fmt: skip
    last = (row_stop - 1) * in_features + column_stop - 1
    if library is None or not _plain_4bit(codes, absmax, nested_absmax, nested_code, last // block_size, dtype):
        return dequantize_4bit_reference(
            codes, absmax, nested_absmax, nested_code, offset, quant_type, block_size, in_features,
            row, row_stop, column, column_stop, dtype,
        )  # fmt: skip
    _check_bounds(codes.numel() * 2, in_features, row, row_stop, column, column_stop)
    out = scratch_empty(codes, row_stop - row, column_stop - column, dtype=dtype) if into is None else into
    library.topwork_dequantize_4bit(
        codes.data_ptr(), absmax.data_ptr(), None if nested_absmax is None else nested_absmax.data_ptr(),
        None if nested_code is None else nested_code.data_ptr(), offset, _code_on(quant_type, codes.device).data_ptr(),
        block_size, in_features, row, row_stop - row, column, column_stop - column, FLOATS.index(dtype),
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def dequantize_int8_cpu(
    codes: Tensor, absmax: Tensor, row: int, row_stop: int, column: int, column_stop: int, dtype: torch.dtype,
    into: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same of `dequantize_int8`."""
    library = native.compiled("quantize4")
    if library is None and triton.INTERPRETED:
        return _dequantize_int8_cuda(codes, absmax, row, row_stop, column, column_stop, dtype)
    if library is None or not _plain_int8(codes, absmax, dtype):
        return dequantize_int8_reference(codes, absmax, row, row_stop, column, column_stop, dtype)
    _check_bounds(codes.numel(), codes.shape[1], row, row_stop, column, column_stop)
    out = scratch_empty(codes, row_stop - row, column_stop - column, dtype=dtype) if into is None else into
    library.topwork_dequantize_int8(
        codes.data_ptr(), absmax.data_ptr(), codes.shape[1], row, row_stop - row, column, column_stop - column,
        FLOATS.index(dtype), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _plain_4bit(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, last_block: int,
    dtype: torch.dtype,
) -> bool:  # fmt: skip
    """Whether a kernel, which sees bare memory, may read this; anything else is left to the truth and its errors."""
    held = [codes, absmax]
    types = [torch.uint8, torch.float32]
    if nested_absmax is not None and nested_code is not None:
        held += [nested_absmax, nested_code]
        types = [torch.uint8, torch.uint8, torch.float32, torch.float32]
        if nested_absmax.numel() <= last_block // 256 or nested_code.numel() != 256:
            return False
    return (
        dtype in FLOATS
        and absmax.numel() > last_block
        and [tensor.dtype for tensor in held] == types
        and all(tensor.is_contiguous() and tensor.device == codes.device for tensor in held)
    )


def _plain_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> bool:
    """As `_plain_4bit`."""
    types = (codes.dtype, absmax.dtype) == (torch.int8, torch.float32)
    laid_out = codes.is_contiguous() and absmax.is_contiguous() and absmax.device == codes.device
    return types and laid_out and absmax.numel() == codes.shape[0] and dtype in FLOATS


def _dequantize_4bit_cuda(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: float,
    quant_type: str, block_size: int, in_features: int, row: int, row_stop: int, column: int, column_stop: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    kernels = triton.module("dequantize4")
    last = (row_stop - 1) * in_features + column_stop - 1
    plain = _plain_4bit(codes, absmax, nested_absmax, nested_code, last // block_size, dtype)
    if kernels is None or not plain or block_size not in BLOCK_SIZES:  # the kernel's groups of 32 lie in one block
        return dequantize_4bit_reference(
            codes, absmax, nested_absmax, nested_code, offset, quant_type, block_size, in_features,
            row, row_stop, column, column_stop, dtype,
        )  # fmt: skip
    _check_bounds(codes.numel() * 2, in_features, row, row_stop, column, column_stop)
    out = torch.empty(row_stop - row, column_stop - column, dtype=dtype, device=codes.device)
    code = _code_on(quant_type, codes.device)
    kernels.unpack_4bit(
        codes, absmax, nested_absmax, nested_code, offset, code, block_size, in_features, row, column, out
    )  # fmt: skip
    return out


def _dequantize_int8_cuda(
    codes: Tensor, absmax: Tensor, row: int, row_stop: int, column: int, column_stop: int, dtype: torch.dtype
) -> Tensor:
    kernels = triton.module("dequantize4")
    if kernels is None or not _plain_int8(codes, absmax, dtype):
        return dequantize_int8_reference(codes, absmax, row, row_stop, column, column_stop, dtype)
    _check_bounds(codes.numel(), codes.shape[1], row, row_stop, column, column_stop)
    out = torch.empty(row_stop - row, column_stop - column, dtype=dtype, device=codes.device)
    kernels.unpack_int8(codes, absmax, row, column, out)
    return out


def _check_bounds(count: int, in_features: int, row: int, row_stop: int, column: int, column_stop: int) -> None:
    """A kernel checks nothing, and torch's own indexing counts negative rows from the end."""
    inside = 0 <= row <= row_stop and 0 <= column <= column_stop <= in_features
    if not inside or (row_stop > row and (row_stop - 1) * in_features + column_stop > count):
        raise IndexError(
            f"rows {row}:{row_stop} and columns {column}:{column_stop} do not lie in a weight of {count} values, "
            f"{in_features} a row"
        )


@cache
def _code_on(quant_type: str, device: torch.device) -> Tensor:
    """`code_of`, made once for each device."""
    return code_of(quant_type, device)


_LIBRARY = registry.Library("topwork", "FRAGMENT")
_LIBRARY.define(
    "dequantize_4bit(Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, float offset, "
    "str quant_type, int block_size, int in_features, int row, int row_stop, int column, int column_stop, "
    "ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "dequantize_int8(Tensor codes, Tensor absmax, int row, int row_stop, int column, int column_stop, ScalarType dtype)"
    " -> Tensor"
)
_LIBRARY.impl("dequantize_4bit", dequantize_4bit_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize_int8", dequantize_int8_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize_4bit", dequantize_4bit_cpu, "CPU")
_LIBRARY.impl("dequantize_int8", dequantize_int8_cpu, "CPU")
_LIBRARY.impl("dequantize_4bit", _dequantize_4bit_cuda, "CUDA")
_LIBRARY.impl("dequantize_int8", _dequantize_int8_cuda, "CUDA")


def _panel_fake(codes: Tensor, *rest: Any) -> Tensor:
    """The shape and type of either's result."""
    *_, row, row_stop, column, column_stop, dtype = rest
    return codes.new_empty(row_stop - row, column_stop - column, dtype=dtype)


registry.register_fake("topwork::dequantize_4bit", _panel_fake, lib=_LIBRARY)
registry.register_fake("topwork::dequantize_int8", _panel_fake, lib=_LIBRARY)

dequantize_4bit = torch.ops.topwork.dequantize_4bit.default
"""A panel of a 4-bit weight: `dequantize_4bit_reference` by the fastest kernel for where the codes are."""
dequantize_int8 = torch.ops.topwork.dequantize_int8.default
"""A panel of an int8 weight: `dequantize_int8_reference` by the fastest kernel for where the codes are."""
