"""Random groups of projections with all that adapters learn at them, and the same formula for autograd."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.bundles import LowRank
from topwork.ops.packed import Packed
from topwork.ops.project import project
from topwork.ops.projection import Projection
from topwork.ops.prologues import Gated, Identity, Prologue, RmsNorm
from topwork.ops.vectors import Gain, Shift

T, IN = 23, 40
PROLOGUES: dict[str, Prologue] = {
    "as is": Identity(),
    "norm": RmsNorm(1 + 0.3 * torch.randn(IN, generator=torch.Generator().manual_seed(0)), 1e-5),
    "norm with offset": RmsNorm(0.3 * torch.randn(IN, generator=torch.Generator().manual_seed(0)), 1e-6, True),
    "silu": Gated("silu"),
    "gelu": Gated("gelu_tanh"),
}
SEGMENTS: dict[str, list[tuple[int, int]]] = {
    "one adapter": [(0, T)],
    "two adapters": [(0, 9), (9, T)],
    "beside the bare base": [(4, 11), (17, T)],
    "an empty one": [(0, 5), (5, 5), (5, T)],
    "none": [],
}


def a_group(outputs: Sequence[int], segments: Sequence[tuple[int, int]], bias: bool = False) -> list[Projection]:
    """Random projections; ranks and scalings differ from term to term, and not every projection has every term."""
    group = []
    for number, out in enumerate(outputs):
        terms = []
        for at, (start, stop) in enumerate(segments):
            if number == 1 and at == 1:
                continue
            r = 3 + number + 2 * at
            a, b = torch.randn(r, IN) / math.sqrt(IN), torch.randn(out, r)
            terms.append(LowRank(start, stop, a.requires_grad_(), b.requires_grad_(), 0.5 + at + number))
        group.append(Projection(torch.randn(out, IN), torch.randn(out) if bias else None, tuple(terms)))
    return group


def masters(group: Sequence[Projection]) -> list[Tensor]:
    terms = [tensor for projection in group for term in projection.terms for tensor in (term.a, term.b)]
    factors = [gain.factor for projection in group for gain in (*projection.gains, *projection.input_gains)]
    return terms + factors + [shift.amount for projection in group for shift in projection.shifts]


def truth(x: Tensor, group: Sequence[Projection], prologue: Prologue) -> Tensor:
    """The same formula, one layer at a time, for autograd."""
    if isinstance(prologue, RmsNorm):
        weight = prologue.weight.double() + (1 if prologue.unit_offset else 0)
        n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + prologue.eps) * weight
    elif isinstance(prologue, Gated):
        gate, up = x.chunk(2, -1)
        n = (F.silu(gate) if prologue.kind == "silu" else F.gelu(gate, approximate="tanh")) * up
    else:
        n = x
    parts = []
    for projection in group:
        weight = projection.weight.dense() if isinstance(projection.weight, Packed) else projection.weight
        given = n
        for gain in projection.input_gains:
            given = torch.where(inside(x, gain), given * gain.factor.double(), given)
        y = F.linear(given, weight.double(), None if projection.bias is None else projection.bias.double())
        for term in projection.terms:
            y = y + inside(x, term) * (term.scaling * n @ term.a.double().t() @ term.b.double().t())
        for shift in projection.shifts:
            y = y + inside(x, shift) * shift.amount.double()
        for gain in projection.gains:
            left_alone = 0 if gain.with_bias or projection.bias is None else projection.bias.double()
            y = torch.where(inside(x, gain), (y - left_alone) * gain.factor.double() + left_alone, y)
        parts.append(y)
    return torch.cat(parts, -1)


def inside(x: Tensor, part: LowRank | Gain | Shift) -> Tensor:
    """Whether each row [T, 1] is one of a part's."""
    rows = torch.arange(len(x))
    return ((rows >= part.start) & (rows < part.stop))[:, None]


def an_input(prologue: Prologue, rows: int = T) -> Tensor:
    return torch.randn(rows, 2 * IN if isinstance(prologue, Gated) else IN)


def both(x: Tensor, group: Sequence[Projection], prologue: Prologue) -> tuple[list[Tensor], list[Tensor]]:
    """(output, dx, dA, dB, ...) of `project`, and of the truth in fp64."""
    found = []
    for run, given in ((project, x), (truth, x.double())):
        given = given.detach().clone().requires_grad_()
        y = run(given, group, prologue)
        value = y.detach().clone()  # the backward pass of gains writes over it
        torch.manual_seed(1)
        dy = torch.randn(y.shape).to(y.dtype)
        learned = masters(group)
        grads = torch.autograd.grad(y, [given, *learned], dy.to(x.dtype).to(y.dtype), allow_unused=True)
        found.append([value, *(torch.zeros(1) if g is None else g for g in grads)])
    return found[0], found[1]
