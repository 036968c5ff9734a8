"""Outputs times a vector that learns (DoRA's magnitude, IA3), in place.

    y = f z - (f - 1) b                  the gain leaves alone what b added to z
    dz = f dy    df = sum over rows of dy (z - b) = sum over rows of dy (y - b) / f

z, y and their gradients are [T, n], mostly in 16 bits; f and b [n] are fp32, as is all arithmetic: in 16 bits a factor
near one would be one, and of a factor far from one nothing would be left but its distance from one.
"""

import torch
from torch import Tensor

from topwork.ops.native import load as native
from topwork.ops.native.load import told
from topwork.ops.rows import rows_at_once

ROWS = 64
"""Whose sum one thread takes: sums do not depend on how many threads there are."""


def multiply_(z: Tensor, factor: Tensor, left_alone: Tensor | None = None) -> None:
    """z [T, n] becomes y; `left_alone` is b. Raises ValueError for other shapes."""
    _check(factor, left_alone, z)
    shift = None if left_alone is None else left_alone.float() * (factor - 1)
    if native.contiguous_rows(z) and (library := native.kernels("layer", z)):
        factor = factor.contiguous()
        library.topwork_gain(
            z.data_ptr(), z.stride(0), *z.shape, factor.data_ptr(), None if shift is None else shift.data_ptr(),
            z.dtype == torch.bfloat16, torch.get_num_threads(),
        )  # fmt: skip
    else:
        multiply_reference_(z, factor, shift)


def multiply_reference_(z: Tensor, factor: Tensor, shift: Tensor | None) -> None:
    """The truth, with shift = (f - 1) b."""
    for rows in z.split(rows_at_once(z)):
        product = rows * factor
        rows.copy_(product if shift is None else product - shift)


def gain_gradients_(y: Tensor, dy: Tensor, factor: Tensor, left_alone: Tensor | None = None) -> Tensor:
    """df [n] in fp32; y [T, n] becomes dz. A factor of zero has let nothing through that could tell: its gradient is
    zero. Raises ValueError for other shapes."""
    _check(factor, left_alone, y, dy)
    offset = None if left_alone is None else left_alone.float().contiguous()
    plain = dy.dtype == y.dtype and native.contiguous_rows(y) and native.contiguous_rows(dy)
    if plain and (library := native.kernels("layer", y)):
        factor = factor.contiguous()
        sums = factor.new_empty(max(1, -(-len(y) // ROWS)), len(factor))
        library.topwork_gain_backward(
            y.data_ptr(), y.stride(0), dy.data_ptr(), dy.stride(0), *y.shape, factor.data_ptr(),
            None if offset is None else offset.data_ptr(), sums.data_ptr(), ROWS, y.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )  # fmt: skip
        total = sums[0]
    else:
        total = gain_sums_reference_(y, dy, factor, offset)
    return torch.where(factor == 0, 0.0, total / factor)


def gain_sums_reference_(y: Tensor, dy: Tensor, factor: Tensor, offset: Tensor | None) -> Tensor:
    """The truth: sum over rows of dy (y - b); y becomes dz."""
    total = torch.zeros_like(factor)
    for rows, slopes in zip(y.split(rows_at_once(y)), dy.split(rows_at_once(y))):
        wide = slopes.to(torch.promote_types(slopes.dtype, factor.dtype))
        total += (wide * (rows if offset is None else rows - offset)).sum(0)
        rows.copy_(wide * factor)
    return total


def _check(factor: Tensor, left_alone: Tensor | None, *tensors: Tensor) -> None:
    """Kernels see bare memory."""
    if factor.ndim != 1 or factor.dtype != torch.float32:
        raise ValueError(f"the gain's factor is {told(factor)}, expected fp32 [n]")
    if left_alone is not None and left_alone.shape != factor.shape:
        raise ValueError(f"a gain of {told(factor)} leaves {told(left_alone)} alone, expected one shape")
    for x in tensors:
        if x.shape != (tensors[0].shape[0], *factor.shape) or x.device != factor.device:
            raise ValueError(f"a gain of {told(factor)} on {told(x)}, expected [T, {len(factor)}] on {factor.device}")
