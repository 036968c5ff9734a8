"""Experts held in one tensor each for their first and their last matrices, with adapters' low-rank terms in both:
forward and backward by hand.

    tokens [T, d], each with k experts and their weights, become S = T k rows, sorted by expert and then by adapter
    U = X W1[e] + b1[e] + s X A1[e]' B1[e]'          H = gate(U)
    Y = H W2[e] + b2[e] + s H A2[e]' B2[e]'          out[t] = sum of w Y over t's rows

    Q = dout[t] W2[e]' + s dout[t] B2[e] A2[e]       dw = <Q, H> + <dout[t], b2[e]>
    dU = w Q gate'(U)                                dX = dU W1[e]' + s dU B1[e] A1[e]

Weights are frozen. What is kept is U and the rows' r values between A and B; X, H and Y are made again or not needed.
No dense change of any expert is ever made: LoRA costs 6 r (in + out) FLOPs a row, as at a linear layer, each stage's
small products in one call (`ops/runs.py`). The plain formula is transformers' own
(integrations/moe.py: grouped_mm_experts_forward), with W + s B A in the place of W.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from topwork.ops.context import saved_empty
from topwork.ops.runs import RunOuter, RunProduct, Runs, run_products, sorted_products


@dataclass(frozen=True)
class Experts:
    """What frozen experts are: first [E, d, f'], last [E, f, d] (views, whichever way round they lie), their biases
    [E, …] where they have some, and the gate between them, [S, f'] -> [S, f]."""

    first: Tensor
    last: Tensor
    first_bias: Tensor | None
    last_bias: Tensor | None
    gate: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExpertTerm:
    """s B A for each of E experts, as PEFT lays them: a [E r, in], expert by expert, and b [out, r E], in whose columns
    the experts stand side by side for each of the r. Both are the fp32 masters, which learn."""

    a: Tensor
    b: Tensor
    experts: int
    scaling: float

    @property
    def rank(self) -> int:
        """Of each expert."""
        return self.a.shape[0] // self.experts

    def inward(self, dtype: torch.dtype) -> Tensor:
        """Every expert's A [E, r, in]."""
        return self.a.to(dtype).view(self.experts, self.rank, -1)

    def outward(self, dtype: torch.dtype) -> Tensor:
        """Every expert's B' [E, r, out]."""
        return self.b.to(dtype).t().contiguous().view(self.rank, self.experts, -1).transpose(0, 1)


class Terms(NamedTuple):
    """An adapter's, at the first and at the last matrices; None where it has none."""

    first: ExpertTerm | None
    last: ExpertTerm | None


class _Sorted(NamedTuple):
    """The S rows of a pass in the order in which they are multiplied.

    order    [S] which of the tokens' k choices, flat, each is; `places` the other way round
    tokens   [S] whose row it is
    experts  [S] its expert
    stops    [E] int32, where each expert's rows end
    runs     for each adapter its rows of each expert
    """

    order: Tensor
    places: Tensor
    tokens: Tensor
    experts: Tensor
    stops: Tensor
    runs: tuple[Runs, ...]


def run_experts(
    x: Tensor, indices: Tensor, weights: Tensor, experts: Experts, adapters: Sequence[Terms], numbers: Tensor,
    alone: bool = False,
) -> Tensor:  # fmt: skip
    """x [T, d] -> [T, d]. indices [T, k] says to which experts each token goes, weights [T, k] with which shares, and
    numbers [T] int64 which of the `adapters` it belongs to, len(adapters) for the bare base; `alone` where one adapter
    has them all."""
    learned = [tensor for terms in adapters for term in terms if term is not None for tensor in (term.a, term.b)]
    rows = _sorted(indices, numbers, experts.first.shape[0], len(adapters), alone)
    out: Tensor = _Experts.apply(x, weights, rows, experts, tuple(adapters), *learned)
    return out


def _sorted(indices: Tensor, numbers: Tensor, experts: int, adapters: int, alone: bool) -> _Sorted:
    """Where there is one adapter and all tokens are its own, the order is transformers' own."""
    chosen, groups = indices.reshape(-1), adapters + 1
    choices = indices.shape[1]
    key = chosen * groups + numbers.repeat_interleave(choices)
    order = torch.argsort(key, stable=True)
    counts = key.new_zeros(experts * groups).scatter_add_(0, key, torch.ones_like(key)).view(experts, groups)
    stops = counts.flatten().cumsum(0).view(experts, groups)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    starts = stops - counts
    runs = tuple(Runs(starts[:, n].contiguous(), counts[:, n].contiguous(), alone) for n in range(adapters))
    return _Sorted(order, places, order // choices, chosen[order], stops[:, -1].to(torch.int32), runs)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, rows, experts, adapters, *learned):  # type: ignore[no-untyped-def]
        given = x.index_select(0, rows.tokens)
        u = _biased(sorted_products(given, experts.first, rows.stops), experts.first_bias, rows)
        first = _add(given, [terms.first for terms in adapters], rows, u)
        h = experts.gate(u)
        y = _biased(sorted_products(h, experts.last, rows.stops), experts.last_bias, rows)
        last = _add(h, [terms.last for terms in adapters], rows, y)
        shared = (y * weights.reshape(-1, 1)[rows.order])[rows.places]
        ctx.experts, ctx.adapters, ctx.stops, ctx.runs = experts, adapters, rows.stops, rows.runs
        ctx.save_for_backward(x, weights, u, first, last, *rows[:4], *learned)
        return shared.view(*weights.shape, -1).sum(1).to(x.dtype)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        x, weights, u, first, last, order, places, tokens, chosen = ctx.saved_tensors[:9]
        experts, adapters, rows = ctx.experts, ctx.adapters, _Sorted(order, places, tokens, chosen, ctx.stops, ctx.runs)
        share = weights.reshape(-1, 1)[rows.order]
        given = dout.index_select(0, rows.tokens)
        q = sorted_products(given, experts.last.transpose(1, 2), rows.stops)
        terms = [one.last for one in adapters]
        slopes = _slopes(given, terms, rows, last, q)
        h, pulled = _gated(experts, u)
        dweights = _share_gradient(q, h, given, experts, rows).view_as(weights).to(weights.dtype)
        last_gradients = _gradients(h, terms, rows, given, _times(last, share), _times(slopes, share))
        du = pulled(q.mul_(share))
        del h, q, given
        terms = [one.first for one in adapters]
        dx = sorted_products(du, experts.first.transpose(1, 2), rows.stops) if ctx.needs_input_grad[0] else None
        slopes = _slopes(du, terms, rows, first, dx)
        again = x.index_select(0, rows.tokens)
        first_gradients = _gradients(again, terms, rows, du, first, slopes)
        if dx is not None:
            dx = dx[rows.places].view(*weights.shape, -1).sum(1)
        pairs = [gradient for both in zip(first_gradients, last_gradients) for gradient in both if gradient is not None]
        return dx, dweights, None, None, None, *(tensor for pair in pairs for tensor in pair)


Ranks = list[ExpertTerm | None]


def _biased(y: Tensor, bias: Tensor | None, rows: _Sorted) -> Tensor:
    return y if bias is None else y.add_(bias[rows.experts])


def _add(given: Tensor, terms: Ranks, rows: _Sorted, out: Tensor) -> Tensor:
    """The rows' values between A and B [S, R], and adds B's products to out."""
    ranks = max((term.rank for term in terms if term is not None), default=0)
    inner = saved_empty(given, len(given), ranks)
    into, onto = [], []
    for term, runs in zip(terms, rows.runs):
        if term is not None:
            part = inner[:, : term.rank]
            into.append(RunProduct(given, term.inward(given.dtype).transpose(1, 2), part, runs))
            onto.append(RunProduct(part, term.outward(given.dtype), out, runs, term.scaling, 1))
    run_products(into)
    run_products(onto)
    return inner


def _slopes(dout: Tensor, terms: Ranks, rows: _Sorted, inner: Tensor, given: Tensor | None) -> Tensor:
    """s dout B [S, R], like `inner`; adds what A makes of it to the gradient of what A was given, where it is asked
    for."""
    slopes = torch.empty_like(inner)
    into, onto = [], []
    for term, runs in zip(terms, rows.runs):
        if term is not None:
            part = slopes[:, : term.rank]
            into.append(RunProduct(dout, term.outward(dout.dtype).transpose(1, 2), part, runs, term.scaling))
            if given is not None:
                onto.append(RunProduct(part, term.inward(dout.dtype), given, runs, 1.0, 1))
    run_products(into)
    run_products(onto)
    return slopes


def _gradients(
    given: Tensor, terms: Ranks, rows: _Sorted, dout: Tensor, inner: Tensor, slopes: Tensor
) -> list[tuple[Tensor, Tensor] | None]:
    """Of A and B of each term, as it has them."""
    found: list[tuple[Tensor, Tensor] | None] = []
    products, turned = [], []
    for term, runs in zip(terms, rows.runs):
        if term is None:
            found.append(None)
            continue
        r, e = term.rank, term.experts
        da, db = torch.empty_like(term.a), term.b.new_empty(r * e, term.b.shape[0])
        products.append(RunOuter(slopes[:, :r], given, da.view(e, r, -1), runs))
        products.append(RunOuter(inner[:, :r], dout, db.view(r, e, -1).transpose(0, 1), runs, term.scaling))
        turned.append((da, db))
        found.append((da, db))
    run_products(products)
    return [None if pair is None else (pair[0], pair[1].t().contiguous()) for pair in found]


def _gated(experts: Experts, u: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """H, and what takes its gradient back to U's."""
    with torch.enable_grad():
        start = u.detach().requires_grad_()
        h = experts.gate(start)

    def pulled(dh: Tensor) -> Tensor:
        return torch.autograd.grad(h, start, dh)[0]

    return h.detach(), pulled


def _share_gradient(q: Tensor, h: Tensor, given: Tensor, experts: Experts, rows: _Sorted) -> Tensor:
    """<dout, Y> of every row, in the order of the tokens' choices."""
    found = (q.float() * h.float()).sum(1)
    if experts.last_bias is not None:
        found = found + (given.float() * experts.last_bias[rows.experts].float()).sum(1)
    return found[rows.places]


def _times(values: Tensor, share: Tensor) -> Tensor:
    return (values * share).to(values.dtype)
