"""Vectors that learn, times values or added to them, in place: plain torch (the truth), C on the CPU, Triton on CUDA.

    y = f z - (f - 1) b                  a gain (DoRA's magnitude, IA3); it leaves alone what b added to z
    dz = f dy    df = sum over rows of dy (z - b) = sum over rows of dy (y - b) / f
    y = z + s    ds = sum over rows of dy       a shift (BitFit's bias)

z, y and their gradients are [T, n], mostly in 16 bits; f, s and b [n] are fp32, as is all arithmetic, and each value is
rounded once: in 16 bits a factor near one would be one, of a factor far from one nothing would be left but its distance
from one, and a sum over rows would stop growing. Of an output's gain y is at hand when it goes backward, of an input's
z. (C has the gain of outputs alone.)
"""

import torch
from torch import Tensor

from topwork.ops.native import load as native
from topwork.ops.native.load import contiguous_rows, told
from topwork.ops.rows import rows_at_once
from topwork.ops.triton import load as triton

ROWS = 64
"""Whose sum one thread takes: sums do not depend on how many threads there are."""


def multiply_(z: Tensor, factor: Tensor, left_alone: Tensor | None = None) -> None:
    """z [T, n] becomes y; `left_alone` is b. Raises ValueError for other shapes."""
    _check(factor, left_alone, z)
    if contiguous_rows(z) and (library := native.kernels("layer", z)):
        factor, shift = factor.contiguous(), _shift(factor, left_alone)
        library.topwork_gain(
            z.data_ptr(), z.stride(0), *z.shape, factor.data_ptr(), None if shift is None else shift.data_ptr(),
            z.dtype == torch.bfloat16, torch.get_num_threads(),
        )  # fmt: skip
    elif contiguous_rows(z) and (kernels := triton.kernels("gain", z)):
        kernels.multiply_(z, factor, left_alone)
    else:
        multiply_reference_(z, factor, left_alone)


def multiply_reference_(z: Tensor, factor: Tensor, left_alone: Tensor | None) -> None:
    """The truth."""
    shift = _shift(factor, left_alone)
    for rows in z.split(rows_at_once(z)):
        product = rows * factor
        rows.copy_(product if shift is None else product - shift)


def gain_gradients_(y: Tensor, dy: Tensor, factor: Tensor, left_alone: Tensor | None = None) -> Tensor:
    """df [n] in fp32; y [T, n] becomes dz. A factor of zero has let nothing through that could tell: its gradient is
    zero. Raises ValueError for other shapes."""
    _check(factor, left_alone, y, dy)
    plain = dy.dtype == y.dtype and contiguous_rows(y) and contiguous_rows(dy)
    if plain and (library := native.kernels("layer", y)):
        factor, offset = factor.contiguous(), None if left_alone is None else left_alone.float().contiguous()
        sums = factor.new_empty(max(1, -(-len(y) // ROWS)), len(factor))
        library.topwork_gain_backward(
            y.data_ptr(), y.stride(0), dy.data_ptr(), dy.stride(0), *y.shape, factor.data_ptr(),
            None if offset is None else offset.data_ptr(), sums.data_ptr(), ROWS, y.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )  # fmt: skip
        total = sums[0]
    elif contiguous_rows(y) and (kernels := triton.kernels("gain", y)):
        return kernels.gain_sums_(y, _by_row(dy), factor, left_alone, y, True)
    else:
        total = gain_sums_reference_(y, dy, factor, left_alone, y)
    return torch.where(factor == 0, 0.0, total / factor)


def input_gain_gradients_(z: Tensor, dy: Tensor, factor: Tensor) -> Tensor:
    """df [n] in fp32 from z, of which y was made aside; dy [T, n] becomes dz. Raises ValueError for other shapes."""
    _check(factor, None, z, dy)
    if contiguous_rows(dy) and (kernels := triton.kernels("gain", z)):
        return kernels.gain_sums_(_by_row(z), dy, factor, None, dy, False)
    return gain_sums_reference_(z, dy, factor, None, dy)


def gain_sums_reference_(y: Tensor, dy: Tensor, factor: Tensor, left_alone: Tensor | None, into: Tensor) -> Tensor:
    """The truth: sum over rows of dy (y - b); `into`, which is y or dy, becomes dz."""
    total, step = torch.zeros_like(factor), rows_at_once(y)
    offset = None if left_alone is None else left_alone.float()
    for rows, slopes, out in zip(y.split(step), dy.split(step), into.split(step)):
        wide = slopes.to(torch.promote_types(slopes.dtype, factor.dtype))
        total += (wide * (rows if offset is None else rows - offset)).sum(0)
        out.copy_(wide * factor)
    return total


def add_(z: Tensor, amount: Tensor) -> None:
    """z [T, n] gets s on top. Raises ValueError for other shapes."""
    _check(amount, None, z)
    if contiguous_rows(z) and (kernels := triton.kernels("gain", z)):
        kernels.add_(z, amount)
    else:
        add_reference_(z, amount)


def add_reference_(z: Tensor, amount: Tensor) -> None:
    """The truth."""
    for rows in z.split(rows_at_once(z)):
        rows.copy_(rows + amount)


def column_sums(dy: Tensor) -> Tensor:
    """ds [n] in fp32 from dy [T, n]."""
    if kernels := triton.kernels("gain", dy):
        return kernels.column_sums(_by_row(dy))
    return column_sums_reference(dy)


def column_sums_reference(dy: Tensor) -> Tensor:
    """The truth."""
    total = torch.zeros(dy.shape[1], device=dy.device)
    for rows in dy.split(rows_at_once(dy)):
        total += rows.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    return total


def _shift(factor: Tensor, left_alone: Tensor | None) -> Tensor | None:
    """(f - 1) b"""
    return None if left_alone is None else left_alone.float() * (factor - 1)


def _by_row(x: Tensor) -> Tensor:
    return x if contiguous_rows(x) else x.contiguous()


def _check(factor: Tensor, left_alone: Tensor | None, *tensors: Tensor) -> None:
    """Kernels see bare memory."""
    if factor.ndim != 1 or factor.dtype != torch.float32:
        raise ValueError(f"the vector is {told(factor)}, expected fp32 [n]")
    if left_alone is not None and left_alone.shape != factor.shape:
        raise ValueError(f"a gain of {told(factor)} leaves {told(left_alone)} alone, expected one shape")
    for x in tensors:
        if x.shape != (tensors[0].shape[0], *factor.shape) or x.device != factor.device:
            raise ValueError(f"a vector {told(factor)} for {told(x)}, expected [T, {len(factor)}] on {factor.device}")
