"""The residual stream of a decoder layer in fp32, and its branches in 16 bits.

    x' = x + multiplier * y          a branch's output y comes back to the stream
    branch = round(x')               what the next branch begins with
    dx = dx' + dbranch               dy = round(multiplier * dx)

One pass over the memory each way (C, Triton), where plain torch (the truth) makes copies of both types. With `in_place`
the sum takes x's place (a view's excepted), and its gradient that of dx'; the caller answers for it that nobody needs
those any more. With one type there is nothing to round, and all of it is torch's own sum.
"""

import torch
from torch import Tensor

from topwork.ops.context import handoff_empty, saved_empty
from topwork.ops.native import load as native
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


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, multiplier, dtype, in_place):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        ctx.multiplier, ctx.narrow = multiplier, None if y is None else y.dtype
        ctx.in_place = in_place
        in_place = in_place and not x._is_view()  # which torch would refuse, with two outputs
        total = x if in_place or y is None else torch.empty_like(x)
        if in_place:
            ctx.mark_dirty(x)  # also without y: or the next sum would meet a view
        branch = None if dtype is None else saved_empty(x, *x.shape[1:], dtype=dtype)
        add_and_round(x, y, multiplier, total, branch)
        return total, branch

    @staticmethod
    def backward(ctx, dtotal, dbranch):  # type: ignore[no-untyped-def]
        if dtotal is None and dbranch is None:
            return None, None, None, None, None
        if dtotal is None:
            dtotal, dbranch = dbranch.float()[None], None
        wants_y = ctx.narrow is not None and ctx.needs_input_grad[1]
        dy = handoff_empty(dtotal, *dtotal.shape[1:], dtype=ctx.narrow) if wants_y else None
        dx = dtotal if dbranch is None or ctx.in_place else torch.empty_like(dtotal)
        add_and_round(dtotal, dbranch, 1.0, dx, dy, ctx.multiplier)
        return dx, dy, None, None, None


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
