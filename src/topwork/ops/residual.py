"""The residual stream of a decoder layer in fp32, and its branches in 16 bits.

    x' = x + multiplier * y          a branch's output y comes back to the stream
    branch = round(x')               what the next branch begins with, or its norm (`ops/norm.py`)
    dx = dx' + dbranch               dy = round(multiplier * dx)

One pass over the memory each way (C, Triton), where plain torch (the truth) makes copies of both types. With `in_place`
the sum takes x's place (a view's excepted), and its gradient that of dx'; the caller answers for it that nobody needs
those any more. With one type there is nothing to round, and all of it is torch's own sum.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from topwork.ops.context import handback_empty, handoff_empty, saved_empty
from topwork.ops.native import load as native
from topwork.ops.norm import norm_mode, rms_norm, rms_norm_backward
from topwork.ops.prologues import Normed, RmsNorm
from topwork.ops.rows import rows_at_once
from topwork.ops.triton import load as triton


def residual_sum(x: Tensor, y: Tensor, multiplier: float = 1.0, in_place: bool = False) -> Tensor:
    """x [1, T, d] and y [T, d], of x's type or a narrower one, to x's type and shape."""
    if y.dtype == x.dtype:
        return torch.add(x, y, alpha=multiplier)
    return _Residual.apply(x, y, multiplier, None, in_place)[0]


def residual_branch(
    x: Tensor, dtype: torch.dtype, y: Tensor | None = None, multiplier: float = 1.0, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """x or, given y, the sum, and that [T, d] in `dtype`, which a pass keeps."""
    if dtype == x.dtype:
        total = x if y is None else residual_sum(x, y, multiplier)
        return total, total[0]
    return _Residual.apply(x, y, multiplier, dtype, in_place)


def residual_norm(
    x: Tensor, norm: RmsNorm, dtype: torch.dtype, y: Tensor | None = None, multiplier: float = 1.0,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Normed]:  # fmt: skip
    """As `residual_branch` with a narrower `dtype`, and in the branch's place its norm [T, d], with what a group of
    projections is to know of that; it is gone when the next one is made."""
    total, n, branch, rstd = _ResidualNorm.apply(x, y, multiplier, norm, dtype, in_place)
    return total, n, Normed(hands_back=True, norm=norm, of=branch, rstd=rstd)


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, multiplier, dtype, in_place):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.multiplier, ctx.narrow = multiplier, None if y is None else y.dtype
        ctx.in_place = in_place
        total = _total(ctx, x, y, in_place)
        branch = None if dtype is None else saved_empty(x, *x.shape[1:], dtype=dtype)
        add_and_round(x, y, multiplier, total, branch)
        return total, branch

    @staticmethod
    def backward(ctx, dtotal, dbranch):  # type: ignore[no-untyped-def]
        if dtotal is None and dbranch is None:
            return None, None, None, None, None
        if dtotal is None:
            dtotal, dbranch = dbranch.float()[None], None
        dx = dtotal if dbranch is None or ctx.in_place else torch.empty_like(dtotal)
        dy = _gradient_of_y(ctx, dtotal)
        add_and_round(dtotal, dbranch, 1.0, dx, dy, ctx.multiplier)
        return dx, dy, None, None, None


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, multiplier, norm, dtype, in_place):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.multiplier, ctx.narrow = multiplier, None if y is None else y.dtype
        ctx.in_place, ctx.norm = in_place, norm
        total = _total(ctx, x, y, in_place)
        branch = saved_empty(x, *x.shape[1:], dtype=dtype)
        n, rstd = add_and_norm(x, y, multiplier, total, branch, norm)
        ctx.save_for_backward(branch, rstd)
        ctx.mark_non_differentiable(branch, rstd)
        return total, n, branch, rstd

    @staticmethod
    def backward(ctx, dtotal, dn, *_):  # type: ignore[no-untyped-def]
        kept = ctx.saved_tensors
        if dtotal is None and dn is None:
            return None, None, None, None, None, None
        if dtotal is None:
            dtotal, dn = ctx.norm.backward(dn, kept).float()[None], None
        dx = dtotal if dn is None or ctx.in_place else torch.empty_like(dtotal)
        dy = _gradient_of_y(ctx, dtotal)
        if dn is None:
            add_and_round(dtotal, None, 1.0, dx, dy, ctx.multiplier)
        else:
            add_and_norm_backward(dtotal, dn, kept, ctx.norm, dx, dy, ctx.multiplier)
        return dx, dy, None, None, None, None


def _total(ctx: Any, x: Tensor, y: Tensor | None, in_place: bool) -> Tensor:
    """Where the sum goes."""
    in_place = in_place and not x._is_view()  # which torch would refuse, with two outputs
    if in_place:
        ctx.mark_dirty(x)  # also without y: or the next sum would meet a view
    return x if in_place or y is None else torch.empty_like(x)


def _gradient_of_y(ctx: Any, dtotal: Tensor) -> Tensor | None:
    """Memory for it, where it is wanted."""
    wanted = ctx.narrow is not None and ctx.needs_input_grad[1]
    return handoff_empty(dtotal, *dtotal.shape[1:], dtype=ctx.narrow) if wanted else None


def add_and_norm(
    x: Tensor, y: Tensor | None, multiplier: float, total: Tensor, branch: Tensor, norm: RmsNorm
) -> tuple[Tensor, Tensor]:
    """As `add_and_round` with a contiguous `branch`, and of that n [T, d] and rstd [T], as `rms_norm` makes them."""
    if (library := _library(norm, branch, x, y, total)) is None:
        add_and_round(x, y, multiplier, total, branch)
        return rms_norm(branch, norm.weight, norm.eps, norm.unit_offset)
    n, rstd = handback_empty(branch, *branch.shape), saved_empty(x, len(branch))
    library.topwork_add_and_norm(
        x.data_ptr(), None if y is None else y.data_ptr(), total.data_ptr(), branch.data_ptr(), multiplier,
        *branch.shape, norm.weight.data_ptr(), norm.eps, rstd.data_ptr(), n.data_ptr(),
        norm_mode(branch.dtype, norm.weight, norm.unit_offset), torch.get_num_threads(),
    )  # fmt: skip
    return n, rstd


def add_and_norm_backward(
    dtotal: Tensor, dn: Tensor, kept: tuple[Tensor, Tensor], norm: RmsNorm, dx: Tensor, dy: Tensor | None, by: float
) -> None:
    """dx = dtotal + the gradient by the branch, and dy = by * dx, from what `add_and_norm` was given and gave: the
    branch and rstd."""
    branch, rstd = kept
    if (library := _library(norm, branch, dtotal, dn, dx, dy)) is None:
        dbranch = rms_norm_backward(dn, branch, norm.weight, rstd, norm.unit_offset)
        add_and_round(dtotal, dbranch, 1.0, dx, dy, by)
        return
    library.topwork_add_and_norm_backward(
        dtotal.data_ptr(), dn.data_ptr(), branch.data_ptr(), *branch.shape, norm.weight.data_ptr(), rstd.data_ptr(),
        dx.data_ptr(), None if dy is None else dy.data_ptr(), by,
        norm_mode(branch.dtype, norm.weight, norm.unit_offset), torch.get_num_threads(),
    )  # fmt: skip


def _library(norm: RmsNorm, branch: Tensor, *others: Tensor | None) -> ctypes.CDLL | None:
    """The C kernels, where they know types and memory: a stream in fp32, all beside it in bf16, nothing with gaps."""
    there = [branch, *(x for x in others if x is not None)]
    weight, values, device = norm.weight, branch.numel(), branch.device
    fits = branch.dtype == torch.bfloat16 and weight.is_contiguous() and weight.device == device
    fits = fits and weight.dtype in native.KINDS and weight.shape == branch.shape[1:]
    fits = fits and all(
        x.numel() == values and x.is_contiguous() and x.device == device
        and x.dtype == (torch.float32 if x.ndim == 3 else torch.bfloat16)
        for x in there
    )  # fmt: skip
    return native.kernels("layer", branch) if fits and values else None


def add_and_round(
    x: Tensor, y: Tensor | None, multiplier: float, total: Tensor, rounded: Tensor | None, by: float = 1.0
) -> None:
    """total = x + multiplier * y in fp32, and rounded = by * total. x and total [1, T, d] may be one; y and rounded
    [T, d] are narrower. Without y, total has to be x. Raises ValueError for other shapes."""
    tensors = [tensor for tensor in (x, y, total, rounded) if tensor is not None]
    if x.shape[0] != 1 or any(tensor.shape[-2:] != x.shape[1:] or tensor.numel() != x.numel() for tensor in tensors):
        raise ValueError(
            f"shapes {[[*tensor.shape] for tensor in tensors]}, where x [1, T, d] and others alike are expected"
        )
    bare = x.dtype == total.dtype == torch.float32
    bare &= all(tensor.is_contiguous() and tensor.device == x.device for tensor in tensors)
    types = {tensor.dtype for tensor in (y, rounded) if tensor is not None}
    if bare and x.is_cpu and types <= {torch.bfloat16} and (library := native.compiled("layer")) is not None:
        library.topwork_add_and_round(
            *(None if tensor is None else tensor.data_ptr() for tensor in (x, y, total, rounded)), multiplier, by,
            x.numel(), torch.get_num_threads(),
        )  # fmt: skip
    elif bare and types <= set(triton.FLOATS) and (kernels := triton.kernels("residual", x)) is not None:
        kernels.add_and_round(x, y, multiplier, total, rounded, by)
    else:
        add_and_round_reference(x, y, multiplier, total, rounded, by)


def add_and_round_reference(
    x: Tensor, y: Tensor | None, multiplier: float, total: Tensor, rounded: Tensor | None, by: float = 1.0
) -> None:
    """The truth. A sum of two types is slow in torch, so rows are copied to x's type while they are in the cache."""
    step = rows_at_once(x[0])
    for row in range(0, x.shape[1], step):
        at = slice(row, row + step)
        if y is not None:
            torch.add(x[0, at], _times(y[at].to(x.dtype), multiplier), out=total[0, at])
        if rounded is not None:
            rounded[at] = _times(total[0, at], by)


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor
