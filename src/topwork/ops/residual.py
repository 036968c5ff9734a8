"""x + multiplier * y, for the sum of a decoder layer's input and what the layer makes of it."""

import torch
from torch import Tensor

from topwork.ops.kept import in_a_pass
from topwork.ops.project import rows_at_once


def residual_sum(x: Tensor, y: Tensor, multiplier: float = 1.0) -> Tensor:
    """x [1, T, d] and y [T, d], of x's type or a narrower one, to x's type and shape.

    In a training pass the sum takes x's place where the types differ; the caller answers for it that nobody needs x any
    more.
    """
    if y.dtype == x.dtype:
        return torch.add(x, y, alpha=multiplier)
    return _Added.apply(x, y, multiplier)


class _Added(torch.autograd.Function):
    """A sum of two types is slow in torch, so rows are copied to x's type while they are in the cache."""

    @staticmethod
    def forward(ctx, x, y, multiplier):  # type: ignore[no-untyped-def]
        ctx.dtype, ctx.multiplier = y.dtype, multiplier
        out = x if in_a_pass(x) else torch.empty_like(x)
        if out is x:
            ctx.mark_dirty(x)
        step = rows_at_once(y)
        for row in range(0, len(y), step):
            at = slice(row, row + step)
            torch.add(x[0, at], y[at].to(x.dtype), alpha=multiplier, out=out[0, at])
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        dy = grad[0] if ctx.multiplier == 1 else grad[0] * ctx.multiplier
        return grad, dy.to(ctx.dtype), None
