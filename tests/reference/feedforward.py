"""Feed-forward layers with low-rank terms: cases, what fp64 autograd makes of them, and two groups of projections."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.bundles import LowRank
from topwork.ops.dropout import Dropout, stays, token_seeds
from topwork.ops.feedforward import DOWN, GATE, UP, FeedForward, Source, run_backward, run_forward
from topwork.ops.parts import Placed
from topwork.ops.project import project
from topwork.ops.projection import Projection
from topwork.ops.prologues import Gated, Identity, Prologue

PARTS = (GATE, UP, DOWN)
ROUNDING = 1e-2
"""bf16 moves a value by 2e-3 of itself on average, and several roundings stand in a row."""


@dataclass(frozen=True)
class Case:
    """A layer's sizes, its terms by start, stop, part and rank, and whether these have dropout."""

    rows: int
    d: int
    f: int
    terms: tuple[tuple[int, int, int, int], ...]
    kind: str = "silu"
    drops: bool = False


def everywhere(start: int, stop: int, rank: int) -> tuple[tuple[int, int, int, int], ...]:
    return tuple((start, stop, part, rank) for part in PARTS)


CASES = [
    Case(1, 32, 32, everywhere(0, 1, 1)),
    Case(40, 32, 64, ()),
    Case(33, 64, 96, ((0, 33, UP, 5),), "gelu_tanh"),
    Case(131, 32, 160, ((5, 70, DOWN, 1),), "gelu"),
    Case(129, 96, 32, ((0, 129, GATE, 16), (0, 129, DOWN, 40)), "gelu_tanh"),
    Case(150, 96, 160, everywhere(37, 150, 40), "gelu"),
    Case(290, 64, 96, (*everywhere(0, 101, 16), *everywhere(101, 102, 5), *everywhere(102, 270, 40))),
    Case(75, 96, 288, (*everywhere(0, 75, 16), *everywhere(0, 75, 5))),
    Case(65, 32, 64, ((0, 65, GATE, 150), (3, 64, UP, 16), (0, 65, DOWN, 150)), "gelu"),
    Case(77, 33, 47, everywhere(3, 70, 7)),
    Case(151, 96, 160, everywhere(37, 151, 40), "gelu", drops=True),
    Case(210, 64, 96, (*everywhere(0, 101, 16), *everywhere(101, 102, 5), *everywhere(102, 210, 70)), drops=True),
    Case(78, 33, 47, everywhere(3, 70, 7), drops=True),
]
OVERLAPPING = [
    Case(200, 64, 96, (*everywhere(0, 130, 5), *everywhere(70, 200, 16))),
    Case(67, 160, 64, (*everywhere(0, 67, 40), *everywhere(9, 30, 1), *everywhere(8, 64, 16)), "gelu_tanh"),
]


def drawn(case: Case, scaling: float = 0.37) -> FeedForward:
    torch.manual_seed(case.rows)
    both, down = ((torch.randn(of) / of[1] ** 0.5).bfloat16() for of in ((2 * case.f, case.d), (case.d, case.f)))
    gate, up = both.split(case.f)
    weights = (gate, up, down)
    terms = []
    for start, stop, part, r in case.terms:
        outputs, inputs = weights[part].shape
        a, b = torch.randn(r, inputs) / inputs**0.5, torch.randn(outputs, r) / r**0.5
        seeds = token_seeds(torch.full((stop - start,), case.rows), torch.arange(start, stop))
        dropout = Dropout(0.25, 5 * part + start, seeds) if case.drops else None
        terms.append(Placed(LowRank(start, stop, a.requires_grad_(), b.requires_grad_(), scaling, dropout), part))
    return FeedForward(weights, tuple(terms), case.kind)


def rows_of(case: Case, count: int = 2) -> list[Tensor]:
    return [torch.randn(case.rows, case.d).bfloat16() for _ in range(count)]


def learned(layer: FeedForward) -> list[Tensor]:
    return [*(term.a for term, _ in layer.terms), *(term.b for term, _ in layer.terms)]


def forward(layer: FeedForward, n: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """[gate | up], y and every S; what is not written of them is NaN."""
    (rows, d), f = n.shape, layer.features
    both, y = torch.full((rows, 2 * f), torch.nan).bfloat16(), torch.full((rows, d), torch.nan).bfloat16()
    inner = [torch.full((term.stop - term.start, len(term.a)), torch.nan).bfloat16() for term, _ in layer.terms]
    run_forward(layer, n, both, inner, y)
    return both, y, inner


def passes(layer: FeedForward, n: Tensor, dy: Tensor) -> list[Tensor]:
    """[gate | up], y, the gradients of n, of every A and every B, and every S."""
    both, y, inner = forward(layer, n)
    dn = torch.full_like(n, torch.nan)
    all_da, all_db = run_backward(layer, dy, both, inner, dn, Source(n))
    return [both, y, dn, *all_da, *all_db, *inner]


def exact(layer: FeedForward, n: Tensor, dy: Tensor) -> list[Tensor]:
    """y, and the gradients of n, of every A and every B, by fp64 autograd."""
    x = n.detach().double().requires_grad_()
    leaves = [tensor.detach().double().requires_grad_() for tensor in learned(layer)]
    pairs = list(zip(leaves, leaves[len(layer.terms) :]))
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}[layer.kind]

    def product(given: Tensor, part: int) -> Tensor:
        out = given @ layer.weights[part].double().t()
        for (term, its), (a, b) in zip(layer.terms, pairs):
            if its == part:
                seen = given[term.start : term.stop]
                if (lost := term.dropout) is not None:
                    seen = seen * stays(lost, lost.seeds, seen.shape[1]) / (1 - lost.p)
                added = term.scaling * (seen @ a.t()) @ b.t()
                out = out + F.pad(added, (0, 0, term.start, len(given) - term.stop))
        return out

    y = product(act(product(x, GATE)) * product(x, UP), DOWN)
    return [y.detach(), *torch.autograd.grad(y, (x, *leaves), dy.double())]


def by_products(layer: FeedForward, x: Tensor, prologue: Prologue = Identity()) -> tuple[Tensor, Tensor]:
    """[gate | up] and y, as two groups of projections."""
    gate, up, down = (
        Projection(weight, terms=tuple(term for term, its in layer.terms if its == part))
        for part, weight in enumerate(layer.weights)
    )
    both = project(x, (gate, up), prologue, joined=Projection(torch.cat(layer.weights[:2])))
    return both, project(both, (down,), Gated(layer.kind))


def by_products_and_at_once(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """[gate | up], y, the gradients of n, of every A and every B."""
    layer = drawn(case)
    n, dy = rows_of(case)
    x = n.clone().requires_grad_()
    both, y = by_products(layer, x)
    return [both, y, *torch.autograd.grad(y, (x, *learned(layer)), dy)], passes(layer, n, dy)
