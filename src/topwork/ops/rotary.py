"""Rotary position embedding in place, forward and backward: plain torch (the truth), C on the CPU, Triton on CUDA.

    y1 = x1 c1 - x2 s1        x1, x2: the two halves of the first R values of a head; c, s those of cos and sin
    y2 = x2 c2 + x1 s2        (transformers' rotate_half; R < D where only a part of a head is rotated)

    x1 = y1 c1 + y2 s2        inverse: the transpose, which is the gradient
    x2 = y2 c2 - y1 s1

In fp32 (fp64 for fp64) with one rounding to x's type. No autograd.
"""

import ctypes

import torch
from torch import Tensor

from topwork.ops.native import load as native
from topwork.ops.native.load import told
from topwork.ops.triton import load as triton


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    """Rotate x [T, H, D] in place by cos and sin [T, R], R <= D even, in fp32 or x's type.

    x may be any view without overlaps whose last dimension is contiguous. Raises ValueError for what does not fit.
    """
    _check(x, cos, sin)
    if (library := native.kernels("layer", x)) is not None:
        _rotate_cpu(library, x, cos, sin, inverse)
    elif (kernels := triton.kernels("layer", x)) is not None:
        kernels.rotate_(x, cos, sin, inverse)
    else:
        rotate_reference_(x, cos, sin, inverse)


def rotate_reference_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    """The truth of `rotate_`."""
    rotated, half = cos.shape[-1], cos.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    c1, c2 = cos[:, None].to(wide).split(half, -1) if half else (0, 0)
    s1, s2 = sin[:, None].to(wide).split(half, -1) if half else (0, 0)
    x1, x2 = x[..., :half].to(wide), x[..., half:rotated].to(wide)
    if inverse:
        first, second = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        first, second = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    x[..., :half] = first.to(x.dtype)
    x[..., half:rotated] = second.to(x.dtype)


def _rotate_cpu(library: ctypes.CDLL, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    if cos.stride(1) != 1 or sin.stride(1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    (tokens, heads, _), (by_token, by_head, _) = x.shape, x.stride()
    mode = (x.dtype == torch.bfloat16) + 2 * (cos.dtype == torch.bfloat16) + 4 * inverse
    library.topwork_rotate(
        x.data_ptr(), by_token, by_head, tokens, heads, cos.data_ptr(), cos.stride(0), sin.data_ptr(), sin.stride(0),
        cos.shape[1] // 2, mode, torch.get_num_threads(),
    )  # fmt: skip


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raises ValueError unless shapes, types and devices belong together: kernels see bare memory."""
    if x.ndim != 3 or not x.is_floating_point() or not native.contiguous_rows(x):
        raise ValueError(
            f"cannot rotate {told(x)} of strides {x.stride()} in place, expected floats [T, H, D] with contiguous D"
        )
    tokens, heads, width = x.shape
    by_token, by_head, _ = x.stride()
    apart = (tokens == 1 or by_token >= width) and (heads == 1 or by_head >= width)
    nested = by_head * (heads - 1) + width <= by_token or by_token * (tokens - 1) + width <= by_head
    if x.numel() and not (apart and (nested or tokens == 1 or heads == 1)):
        raise ValueError(f"cannot rotate {told(x)} in place: with strides {x.stride()} its values share memory")
    check_tables(cos, sin, tokens, width, x.device, x.dtype)


def check_tables(
    cos: Tensor, sin: Tensor, tokens: int, width: int, device: torch.device, dtype: torch.dtype
) -> None:  # fmt: skip
    """Raises ValueError unless cos and sin turn heads of `width` values of `dtype`, of so many tokens."""
    if cos.shape != sin.shape or cos.dtype != sin.dtype or cos.device != device or sin.device != device:
        raise ValueError(f"cos is {told(cos)} and sin {told(sin)}, expected two alike, on {device}")
    if cos.ndim != 2 or cos.shape[0] != tokens or cos.shape[1] > width or cos.shape[1] % 2:
        raise ValueError(f"cos and sin are {told(cos)}, expected [{tokens}, R] with even R <= {width}")
    if cos.dtype not in (dtype, torch.float32):
        raise ValueError(f"cos and sin are {told(cos)}, expected float32 or the type of what they turn, {dtype}")
