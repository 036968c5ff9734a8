"""RMS norm with a frozen weight, forward and backward: plain torch (the truth), C on the CPU, Triton on CUDA.

    rstd = 1 / sqrt(mean(x^2) + eps)
    y = weight * round(x * rstd)            Llama's; with unit_offset, Gemma's: y = round(x * rstd * (1 + weight))
    dx = rstd * (g - xn * mean(g * xn))        xn = x * rstd, g = dy * weight (or dy * (1 + weight))

All of it in fp32 (fp64 for fp64), `round` is to x's type, and so is the one rounding of y and dx. No autograd: these
are the parts of which a layer's own backward pass is made. A row is the last dimension of x.
"""

import ctypes

import torch
from torch import Tensor

from topwork.ops.context import saved_empty, scratch_empty
from topwork.ops.native import load as native
from topwork.ops.native.load import told
from topwork.ops.triton import load as triton

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> tuple[Tensor, Tensor]:
    """x [..., d], weight [d] -> y like x, contiguous, and rstd [rows] fp32. Raises ValueError for wrong shapes."""
    _check(x, weight)
    if (library := _native(x, weight)) is not None:
        rstd = saved_empty(x, x.numel() // x.shape[-1], dtype=torch.float32)
        return _norm_cpu(library, x, weight, rstd, eps, False, unit_offset), rstd
    if (kernels := triton.kernels("layer", x)) is not None:
        return kernels.rms_norm(x, weight, eps, unit_offset)
    return rms_norm_reference(x, weight, eps, unit_offset)


def rms_normalized(x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool = False) -> Tensor:
    """y of `rms_norm` again, bit for bit, from the rstd [rows] that it returned."""
    _check(x, weight, rstd)
    if (library := _native(x, weight)) is not None:
        return _norm_cpu(library, x, weight, rstd.contiguous(), 0.0, True, unit_offset)
    if (kernels := triton.kernels("layer", x)) is not None:
        return kernels.rms_normalized(x, weight, rstd, unit_offset)
    return rms_normalized_reference(x, weight, rstd, unit_offset)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool = False, into: Tensor | None = None
) -> Tensor:
    """The gradient dx of x from that of y, contiguous, in x's type; `into` is memory that it may take."""
    _check(x, weight, rstd, dy)
    if (library := _native(x, weight)) is not None:
        return _backward_cpu(library, dy, x, weight, rstd.contiguous(), unit_offset, into)
    if (kernels := triton.kernels("layer", x)) is not None:
        return kernels.rms_norm_backward(dy, x, weight, rstd, unit_offset)
    return rms_norm_backward_reference(dy, x, weight, rstd, unit_offset)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> tuple[Tensor, Tensor]:
    """The truth of `rms_norm`."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps).reshape(-1)
    return rms_normalized_reference(x, weight, rstd, unit_offset), rstd


def rms_normalized_reference(x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool = False) -> Tensor:
    """The truth of `rms_normalized`."""
    normalized = _wide(x) * rstd.view(x.shape[:-1])[..., None]
    if unit_offset:
        y = normalized * (1.0 + _wide(weight))
    else:
        y = weight * normalized.to(x.dtype)
    return y.to(x.dtype).contiguous()


def rms_norm_backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool = False
) -> Tensor:
    """The truth of `rms_norm_backward`."""
    scale = rstd.view(x.shape[:-1])[..., None]
    normalized = _wide(x) * scale
    gradient = _wide(dy) * (1.0 + _wide(weight) if unit_offset else _wide(weight))
    dx = scale * (gradient - normalized * (gradient * normalized).mean(-1, keepdim=True))
    return dx.to(x.dtype).contiguous()


def _native(x: Tensor, weight: Tensor) -> ctypes.CDLL | None:
    """The C kernels, where they know the types."""
    known = weight.dtype == x.dtype or weight.dtype == torch.float32
    return native.kernels("layer", x) if known else None


def _norm_cpu(
    library: ctypes.CDLL, x: Tensor, weight: Tensor, rstd: Tensor, eps: float, known: bool, unit_offset: bool
) -> Tensor:
    y = scratch_empty(x, *x.shape)
    x, outer, inner = _rows(x)
    weight = weight.contiguous()
    library.topwork_rms_norm(
        x.data_ptr(), outer, inner, rstd.shape[0], x.shape[1] if x.ndim == 3 else 1, x.shape[-1], weight.data_ptr(),
        eps, known, rstd.data_ptr(), y.data_ptr(), norm_mode(x.dtype, weight, unit_offset), torch.get_num_threads(),
    )  # fmt: skip
    return y


def _backward_cpu(
    library: ctypes.CDLL, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool, into: Tensor | None
) -> Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype) if into is None else into
    dy, dy_outer, dy_inner = _rows(dy)
    x, x_outer, x_inner = _rows(x)
    weight = weight.contiguous()
    library.topwork_rms_norm_backward(
        dy.data_ptr(), dy_outer, dy_inner, x.data_ptr(), x_outer, x_inner,
        rstd.shape[0], x.shape[1] if x.ndim == 3 else 1, x.shape[-1], weight.data_ptr(), rstd.data_ptr(),
        dx.data_ptr(), norm_mode(x.dtype, weight, unit_offset), torch.get_num_threads(),
    )  # fmt: skip
    return dx


def norm_mode(dtype: torch.dtype, weight: Tensor, unit_offset: bool) -> int:
    """As layer.c counts, of values of `dtype`."""
    return (dtype == torch.bfloat16) + 2 * (weight.dtype == torch.bfloat16) + 4 * unit_offset


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x, or a copy that a kernel can walk, and its rows' strides: those of [rows, d] or of [n, heads, d]."""
    if x.ndim not in (2, 3) or x.stride(-1) != 1:
        x = x.contiguous()
    strides = x.stride()
    if x.ndim == 3:
        return x, strides[0], strides[1]
    return x, strides[0] if x.ndim == 2 else x.shape[-1], 0


def _wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(x: Tensor, weight: Tensor, rstd: Tensor | None = None, dy: Tensor | None = None) -> None:
    """Raises ValueError unless shapes, types and devices belong together: kernels see bare memory."""
    if x.dtype not in FLOATS or x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"cannot normalize {told(x)}, expected floats [..., d] with d > 0")
    d = x.shape[-1]
    if weight.ndim != 1 or weight.shape[0] != d or weight.device != x.device:
        raise ValueError(f"the norm's weight is {told(weight)}, expected [{d}] on {x.device} for x {told(x)}")
    if rstd is not None and (
        rstd.ndim != 1 or rstd.shape[0] * d != x.numel() or rstd.device != x.device
        or rstd.dtype != (torch.float64 if x.dtype == torch.float64 else torch.float32)
    ):  # fmt: skip
        raise ValueError(f"rstd is {told(rstd)}, expected that of the {x.numel() // d} rows of x {told(x)}")
    if dy is not None and (dy.shape != x.shape or dy.dtype != x.dtype or dy.device != x.device):
        raise ValueError(f"dy is {told(dy)}, expected one like x, {told(x)}")
