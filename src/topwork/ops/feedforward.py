"""A gated feed-forward layer with the low-rank terms of its adapters as one step, forward and backward.

    n = prologue(x)    gate = n Wg' + s S B'    up alike    h = act(gate) * up    y = h Wd' + s S B'

What `project` does in two groups with a gated unit between them, in the same stages, by one call of C each way
(native/feedforward.h), where a processor has AMX and all of it is C's. The way through Python between the products of
small layers takes as long as some of them.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from topwork.ops.bundles import LowRank
from topwork.ops.context import (
    handback_empty,
    handoff_empty,
    has_workspace,
    saved_empty,
    scratch_empty,
    scratch_scope,
)
from topwork.ops.dropout import drop_reference
from topwork.ops.gated import KINDS, gated_backward_reference, gated_reference
from topwork.ops.grouped import multiplies_all
from topwork.ops.native import load as native
from topwork.ops.norm import norm_mode
from topwork.ops.packed import Packed
from topwork.ops.parts import NOT_ON_AMX, Placed, check_terms, on_amx, opened, part_lines, placed_terms, term_line
from topwork.ops.projection import Projection
from topwork.ops.prologues import Identity, Normed, Prologue, RmsNorm

GATE, UP, DOWN = range(3)
LAYER = struct.Struct("24q")
"""As feedforward.h has a layer."""


@dataclass(frozen=True)
class FeedForward:
    """Frozen weights of gate, up [f, d] and down [d, f], what adapters add to their products, and the unit's kind."""

    weights: tuple[Tensor | Packed, ...]
    terms: tuple[Placed, ...]
    kind: str

    @property
    def features(self) -> int:
        return int(self.weights[DOWN].shape[1])

    def dense(self) -> list[Tensor]:
        """The weights, packed ones opened."""
        return [*opened(self.weights[:DOWN]), *opened(self.weights[DOWN:])]


def feedforward_of(x: Tensor, group: Sequence[Projection], down: Projection | None, kind: str) -> FeedForward | None:
    """The layer of gate, up and down for x [T, d], where it is best made in one step: else None."""
    if len(group) != 2 or down is None or not multiplies_all(x) or not on_amx():
        return None
    layers = (*group, down)
    if any(layer.bias is not None for layer in layers) or (terms := placed_terms((group, (down,)), x.dtype)) is None:
        return None
    return FeedForward(tuple(layer.weight for layer in layers), terms, kind)


def feedforward(
    x: Tensor, layer: FeedForward, prologue: Prologue = Identity(), keeps: bool = True, skip_forward: bool = False
) -> Tensor:
    """x [T, k] -> y [T, d]; `keeps` and `skip_forward` as `project` has them."""
    _check(x, layer)
    learned = [*(term.a for term, _ in layer.terms), *(term.b for term, _ in layer.terms)]
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *learned))
    return _FeedForward.apply(x, prologue, layer, keeps, skip_forward, wanted, *learned)


def _check(x: Tensor, layer: FeedForward) -> None:
    """Raises ValueError for what does not belong together: the kernel sees bare memory."""
    gate, up, down = ((int(w.shape[0]), int(w.shape[1])) for w in layer.weights)
    if up != gate or down != gate[::-1] or not x.is_cpu:
        raise ValueError(
            f"gate {gate}, up {up} and down {down} on {x.device}, where [f, d] twice and [d, f] are expected"
        )
    check_terms(layer.terms, (gate, up, down), len(x))


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, prologue, layer, keeps, skip_forward, wanted, *learned):  # type: ignore[no-untyped-def]
        ctx.prologue, ctx.layer = prologue, layer
        with scratch_scope():
            n, kept = prologue.forward(x)
            out = (saved_empty if keeps else handoff_empty)(n, *n.shape)
            both = saved_empty(n, len(n), 2 * layer.features) if wanted else None
            inner = [saved_empty(n, term.stop - term.start, len(term.a)) for term, _ in layer.terms] if wanted else []
            run_forward(layer, _by_rows(n), both, inner, None if skip_forward else out)
            if skip_forward:
                out.zero_()
        ctx.counts = len(kept), len(inner)
        if wanted:
            ctx.save_for_backward(*kept, both, *inner, *learned)  # with what learns, which torch refuses changed
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        (before, terms), layer, prologue = ctx.counts, ctx.layer, ctx.prologue
        kept, both, inner = (saved := ctx.saved_tensors)[:before], saved[before], saved[before + 1 :][:terms]
        with scratch_scope():
            dn = _room_for_gradient(dout, prologue) if ctx.needs_input_grad[0] else None
            in_place = has_workspace(both)  # nobody looks at it again
            all_da, all_db = run_backward(layer, dout, both, inner, dn, _source(prologue, kept), in_place)
            dx = None if dn is None else prologue.backward(dn, kept)
        return dx, None, None, None, None, None, *all_da, *all_db


def run_forward(
    layer: FeedForward, n: Tensor, both: Tensor | None, inner: Sequence[Tensor], out: Tensor | None
) -> None:  # fmt: skip
    """From n [T, d] [gate | up] [T, 2 f], each term's S [rows, r], and y [T, d]: contiguous, or left out (none in
    `inner`)."""
    rows, f = len(n), layer.features
    both = scratch_empty(n, rows, 2 * f) if both is None else both
    inner = inner or [scratch_empty(n, term.stop - term.start, len(term.a)) for term, _ in layer.terms]
    lines = [term_line(placed, s.data_ptr()) for placed, s in zip(layer.terms, inner)]
    if not _run(layer, lines, n=n, both=both, h=scratch_empty(n, rows, f), y=out):
        for into, value in zip((both, out, *inner), feedforward_reference(layer, n)):
            if into is not None:
                into.copy_(value)


class Source(NamedTuple):
    """What n is made of going backward: x [T, d] with its norm and that norm's numbers [T]; without them n is x."""

    x: Tensor
    norm: RmsNorm | None = None
    rstd: Tensor | None = None

    def made(self) -> Tensor:
        if self.norm is None or self.rstd is None:
            return self.x
        return self.norm.recompute((self.x, self.rstd))


def _source(prologue: Prologue, kept: tuple[Tensor, ...]) -> Source:
    norm = prologue.norm if isinstance(prologue, Normed) else prologue
    if isinstance(norm, RmsNorm) and norm.weight.dtype in native.KINDS and norm.weight.is_contiguous():
        return Source(_by_rows(kept[0]), norm, kept[1])
    return Source(_by_rows(prologue.recompute(kept)))


def run_backward(
    layer: FeedForward, dy: Tensor, both: Tensor, inner: Sequence[Tensor], dn: Tensor | None, source: Source,
    in_place: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """From dy [T, d] and what `run_forward` wrote the gradients of each term's A and B, and dn [T, d] where there is
    one. With `in_place` the gradient of gate and up takes their place."""
    all_da = [torch.empty_like(term.a) for term, _ in layer.terms]
    all_db = [torch.empty_like(term.b) for term, _ in layer.terms]
    g = [scratch_empty(s, *s.shape) for s in inner]
    lines = [
        term_line(placed, s.data_ptr(), its.data_ptr(), da, db)
        for placed, s, its, da, db in zip(layer.terms, inner, g, all_da, all_db)
    ]
    dh, h = (scratch_empty(dy, len(dy), layer.features) for _ in range(2))
    dboth = both if in_place else scratch_empty(dy, *both.shape)
    n = None if source.norm is None else _within(dh, dy)  # made when dh is used up
    if not _run(layer, lines, source, n=n, both=both, h=h, dy=_by_rows(dy), dh=dh, dboth=dboth, dn=dn):
        value, *found = feedforward_backward_reference(layer, dy, both, inner, source.made())
        if dn is not None:
            dn.copy_(value)
        for into, values in zip((all_da, all_db), found):
            for mine, its in zip(into, values):
                mine.copy_(its)
    return all_da, all_db


def _within(room: Tensor, like: Tensor) -> Tensor:
    """A tensor of another's shape, in memory that is free by then if it is large enough."""
    whole = room.view(-1)
    return whole[: like.numel()].view(like.shape) if whole.numel() >= like.numel() else scratch_empty(like, *like.shape)


def feedforward_reference(layer: FeedForward, n: Tensor) -> list[Tensor]:
    """The truth of `run_forward` in fp32, rounded where that rounds: both, y and each S."""
    f, inner, weights = layer.features, [n.new_empty(0)] * len(layer.terms), layer.dense()

    def product(x: Tensor, part: int) -> Tensor:
        y = x.float() @ weights[part].float().t()
        for number, (term, its) in enumerate(layer.terms):
            if its == part:
                rows = slice(term.start, term.stop)
                inner[number] = (_seen(x[rows], term).float() @ term.a.to(x.dtype).float().t()).to(x.dtype)
                y[rows] += term.scaling * (inner[number].float() @ term.b.to(x.dtype).float().t())
        return y.to(x.dtype)

    both = torch.cat([product(n, GATE), product(n, UP)], 1)
    return [both, product(gated_reference(both[:, :f], both[:, f:], layer.kind), DOWN), *inner]


def feedforward_backward_reference(
    layer: FeedForward, dy: Tensor, both: Tensor, inner: Sequence[Tensor], n: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The truth of `run_backward`, with dn first."""
    f, dtype, weights = layer.features, dy.dtype, layer.dense()
    gate, up = both[:, :f], both[:, f:]
    h, g = gated_reference(gate, up, layer.kind).float(), [dy.new_empty(0)] * len(layer.terms)

    def back(dout: Tensor, part: int) -> Tensor:
        dx = dout.float() @ weights[part].float()
        for number, (term, its) in enumerate(layer.terms):
            if its == part:
                rows = slice(term.start, term.stop)
                g[number] = (term.scaling * (dout[rows].float() @ term.b.to(dtype).float())).to(dtype)
                dx[rows] += _seen(g[number].float() @ term.a.to(dtype).float(), term)
        return dx

    slopes = gated_backward_reference(back(dy, DOWN).to(dtype), gate, up, layer.kind)
    dn = (back(slopes[GATE], GATE) + back(slopes[UP], UP)).to(dtype)
    all_da, all_db = [], []
    for (term, part), s, slope in zip(layer.terms, inner, g):
        rows = slice(term.start, term.stop)
        all_da.append(slope.float().t() @ _seen((h if part == DOWN else n.float())[rows], term))
        all_db.append(term.scaling * ((dy, *slopes)[(part + 1) % 3][rows].float().t() @ s.float()))
    return dn, all_da, all_db


def _seen(rows: Tensor, term: LowRank) -> Tensor:
    """A term's rows as its A sees them; of its input's gradient what comes back through that."""
    if term.dropout is None:
        return rows
    out = torch.empty_like(rows, requires_grad=False)
    drop_reference(rows.detach(), term.dropout, out)
    return out


def _room_for_gradient(dout: Tensor, prologue: Prologue) -> Tensor:
    """For dn [T, d]; where there is a prologue, nobody else takes it further."""
    if not isinstance(prologue, Identity):
        return scratch_empty(dout, *dout.shape)
    return handback_empty(dout, *dout.shape) if prologue.hands_back else dout.new_empty(dout.shape)


def _by_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


VALUES = ("n", "both", "h", "y", "dy", "dh", "dboth", "dn")
"""A layer's tensors as the kernel has them; what n is made of comes last."""


def _run(layer: FeedForward, lines: Sequence[bytes], source: Source | None = None, **given: Tensor | None) -> bool:
    """Forward or, with the source of n, backward, over tensors of VALUES. Whether the kernel did it, which sees bare
    memory."""
    like = given["both"]
    assert like is not None
    library = native.kernels("decoder", like) if like.dtype == torch.bfloat16 else None
    if library is None:
        return False
    x, norm, rstd = source or (None, None, None)
    gate, up, down = layer.dense()
    f, d = gate.shape
    values = [*(given.get(name) for name in VALUES), x]
    norms = (0, 0, 0)
    if norm is not None and rstd is not None and x is not None:
        norms = rstd.data_ptr(), norm.weight.data_ptr(), norm_mode(x.dtype, norm.weight, norm.unit_offset)
    numbers = [number for v in values for number in ((0, 0) if v is None else (v.data_ptr(), v.stride(0)))]
    table = LAYER.pack(*numbers, f, d, KINDS.index(layer.kind), *norms)
    parts = b"".join([*part_lines((gate, up)), *part_lines((down,))])
    failed = library.topwork_feedforward(
        parts, table, len(like), b"".join(lines), len(lines), int(source is not None), torch.get_num_threads()
    )
    if failed == NOT_ON_AMX:
        return False
    if failed:
        raise MemoryError(f"no memory for a feed-forward layer of {len(like)} rows")
    return True
