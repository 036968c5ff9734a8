"""x + multiplier * y, for the sum of a decoder layer's input and what the layer makes of it."""

import torch
from torch import Tensor

from topwork.ops.kept import in_a_pass

CACHED_VALUES = 1 << 17
"""How many values of an elementwise sum stay in a core's cache."""


def residual_sum(x: Tensor, y: Tensor, multiplier: float = 1.0) -> Tensor:
    """x [1, T, d] and y [T, d], of x's type or a narrower one, to x's type and shape. In a training pass the sum takes
    x's place where the types differ: whoever needed x has a copy of y's type."""
    if y.dtype == x.dtype:
        return torch.add(x, y, alpha=multiplier)
    if in_a_pass(x):
        return _Added.apply(x, y, multiplier)
    y = y.to(x.dtype)  # a sum of two types is slow in torch
    return (y if multiplier == 1 else y.mul_(multiplier)).add_(x[0])[None]


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, multiplier):  # type: ignore[no-untyped-def]
        ctx.dtype, ctx.multiplier = y.dtype, multiplier
        ctx.mark_dirty(x)
        step = max(1, CACHED_VALUES // y.shape[1])
        for own, other in zip(x[0].split(step), y.split(step)):
            own.add_(other.to(x.dtype), alpha=multiplier)
        return x

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        dy = grad[0] if ctx.multiplier == 1 else grad[0] * ctx.multiplier
        return grad, dy.to(ctx.dtype), None
