"""RMS norm with a frozen weight, forward and backward: plain torch (the truth), C on the CPU, Triton on CUDA.

    rstd = 1 / sqrt(mean(x^2) + eps)
    y = weight * round(x * rstd)            Llama's; with unit_offset, Gemma's: y = round(x * rstd * (1 + weight))
    dx = rstd * (g - xn * mean(g * xn)) + add        xn = x * rstd, g = dy * weight (or dy * (1 + weight))

All of it in fp32 (fp64 for fp64), `round` is to x's type, and so is the one rounding of y and dx. No autograd: these
are the parts of which a layer's own backward pass is made. A row is the last dimension of x.
"""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> tuple[Tensor, Tensor]:
    """x [..., d], weight [d] -> y like x, contiguous, and rstd [rows] fp32. Raises ValueError for wrong shapes."""
    _check(x, weight)
    return rms_norm_reference(x, weight, eps, unit_offset)


def rms_normalized(x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool = False) -> Tensor:
    """y of `rms_norm` again, bit for bit, from the rstd [rows] that it returned."""
    _check(x, weight, rstd)
    return rms_normalized_reference(x, weight, rstd, unit_offset)


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool = False, add: Tensor | None = None
) -> Tensor:
    """The gradient dx of x from that of y, contiguous, in x's type. `add`, shaped like x, joins before the rounding:
    the gradient that comes to x around the norm."""
    _check(x, weight, rstd, dy, add)
    return rms_norm_backward_reference(dy, x, weight, rstd, unit_offset, add)


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
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool = False, add: Tensor | None = None
) -> Tensor:
    """The truth of `rms_norm_backward`."""
    scale = rstd.view(x.shape[:-1])[..., None]
    normalized = _wide(x) * scale
    gradient = _wide(dy) * (1.0 + _wide(weight) if unit_offset else _wide(weight))
    dx = scale * (gradient - normalized * (gradient * normalized).mean(-1, keepdim=True))
    if add is not None:
        dx = dx + _wide(add)
    return dx.to(x.dtype).contiguous()


def _wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(
    x: Tensor, weight: Tensor, rstd: Tensor | None = None, dy: Tensor | None = None, add: Tensor | None = None
) -> None:
    """Raises ValueError unless shapes, types and devices belong together: kernels see bare memory."""
    if x.dtype not in FLOATS or x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"cannot normalize {_told(x)}, expected floats [..., d] with d > 0")
    d = x.shape[-1]
    if weight.ndim != 1 or weight.shape[0] != d or weight.device != x.device:
        raise ValueError(f"the norm's weight is {_told(weight)}, expected [{d}] on {x.device} for x {_told(x)}")
    if rstd is not None and (rstd.numel() * d != x.numel() or rstd.ndim != 1 or rstd.device != x.device):
        raise ValueError(f"rstd is {_told(rstd)}, expected one for each of the {x.numel() // d} rows of x {_told(x)}")
    for name, other in (("dy", dy), ("add", add)):
        if other is not None and (other.shape != x.shape or other.dtype != x.dtype or other.device != x.device):
            raise ValueError(f"{name} is {_told(other)}, expected one like x, {_told(x)}")


def _told(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
