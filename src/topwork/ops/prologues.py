"""What stands before a group of projections and is cheap to make again: nothing, a norm, a gated unit."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from topwork.ops.context import handback_empty, handoff_empty, has_workspace, scratch_empty
from topwork.ops.gated import gated, gated_backward
from topwork.ops.norm import rms_norm, rms_norm_backward, rms_normalized


class Prologue(Protocol):
    """x [T, k] -> n [T, in], and what is kept of it."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]: ...

    def recompute(self, kept: tuple[Tensor, ...]) -> Tensor:
        """The same n, to the bit."""
        ...

    def late_input(self, kept: tuple[Tensor, ...]) -> Tensor | None:
        """Room for n where it is best made again in `backward`, since both read the same; else None."""
        ...

    def backward(self, dn: Tensor, kept: tuple[Tensor, ...], n: Tensor | None = None) -> Tensor:
        """dx from dn, which may be overwritten. n, if given, is what `late_input` made room for, and becomes that."""
        ...


class _AtHand:
    """n is best made again before anything else."""

    def late_input(self, kept: tuple[Tensor, ...]) -> Tensor | None:  # noqa: ARG002
        return None


@dataclass(frozen=True)
class Identity(_AtHand):
    """n = x. `hands_back` where its gradient is used up before the next such one is made."""

    hands_back: bool = False

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return x, (x,)

    def recompute(self, kept: tuple[Tensor, ...]) -> Tensor:
        return kept[0]

    def backward(self, dn: Tensor, kept: tuple[Tensor, ...], n: Tensor | None = None) -> Tensor:  # noqa: ARG002
        return dn


@dataclass(frozen=True)
class RmsNorm(_AtHand):
    """n = norm(x) * weight, as `ops/norm.py` has it; keeps x and one number a row. `hands_back` as in Identity."""

    weight: Tensor
    eps: float
    unit_offset: bool = False
    hands_back: bool = False

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        n, rstd = rms_norm(x, self.weight, self.eps, self.unit_offset)
        return n, (x, rstd)

    def recompute(self, kept: tuple[Tensor, ...]) -> Tensor:
        x, rstd = kept
        return rms_normalized(x, self.weight, rstd, self.unit_offset)

    def backward(self, dn: Tensor, kept: tuple[Tensor, ...], n: Tensor | None = None) -> Tensor:  # noqa: ARG002
        x, rstd = kept
        into = handback_empty(x, *x.shape) if self.hands_back else None
        return rms_norm_backward(dn, x, self.weight, rstd, self.unit_offset, into)


@dataclass(frozen=True, kw_only=True)
class Normed(Identity):
    """n = x, which `norm` made of `of` [T, in] with the numbers rstd [T]: they are kept in its place."""

    norm: RmsNorm
    of: Tensor
    rstd: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return x, (self.of, self.rstd)

    def recompute(self, kept: tuple[Tensor, ...]) -> Tensor:
        return self.norm.recompute(kept)


@dataclass(frozen=True)
class Gated:
    """n = act(gate) * up for x = [gate | up]. `in_place`: whoever made x does not look at it again, so that in a
    training pass the gradient takes its place, where it lies in the cache already."""

    kind: str
    in_place: bool = False

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.recompute((x,)), (x,)

    def recompute(self, kept: tuple[Tensor, ...]) -> Tensor:
        gate, up = kept[0].chunk(2, -1)
        return gated(gate, up, self.kind)

    def late_input(self, kept: tuple[Tensor, ...]) -> Tensor | None:
        (x,) = kept
        return scratch_empty(x, x.shape[0], x.shape[1] // 2) if has_workspace(x) else None  # else dn is in the way

    def backward(self, dn: Tensor, kept: tuple[Tensor, ...], n: Tensor | None = None) -> Tensor:
        (x,) = kept
        gate, up = x.chunk(2, -1)
        dx = x.detach() if self.in_place and has_workspace(x) else handoff_empty(x, *x.shape)
        dgate, dup = dx.chunk(2, -1)
        gated_backward(dn, gate, up, self.kind, (dgate, dup), n)
        return dx


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm):  # type: ignore[no-untyped-def]
        n, kept = norm.forward(x)
        ctx.norm = norm
        ctx.save_for_backward(*kept)
        return n

    @staticmethod
    def backward(ctx, dn):  # type: ignore[no-untyped-def]
        return ctx.norm.backward(dn, ctx.saved_tensors), None


def normed(x: Tensor, norm: Prologue) -> Tensor:
    """A prologue alone, x [T, k] -> [T, in], where what comes next is no group of projections."""
    return _Normed.apply(x, norm)
