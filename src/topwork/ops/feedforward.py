"""A gated feed-forward layer with the low-rank terms of its adapters as one step, forward and backward.

    n = prologue(x)    gate = n Wg' + s S B'    up alike    h = act(gate) * up    y = h Wd' + s S B'

What `project` does in two groups with a gated unit between them. Where the processor has AMX (native/feedforward.c) a
block of rows goes all the way while the caches have it: h, its gradient, and those of gate and up never go to memory.
Outputs and the input's gradient are those of the single products to the bit; the gradients of A and B sum rows in
another order.
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from topwork.ops.bundles import LowRank
from topwork.ops.context import handback_empty, handoff_empty, saved_empty, scratch_empty, scratch_scope
from topwork.ops.gated import KINDS, gated_backward_reference, gated_reference
from topwork.ops.grouped import ON_AMX, multiplies_all
from topwork.ops.native import load as native
from topwork.ops.packed import Packed
from topwork.ops.projection import Projection
from topwork.ops.prologues import Identity, Normed, Prologue, RmsNorm

GATE, UP, DOWN = range(3)
LAYER, TERM = struct.Struct("22q"), struct.Struct("9qd")
"""As feedforward.c has a layer and a term."""
GRID = 32
"""What the layer's inputs and features are whole numbers of, for tiles of AMX."""
FEWEST_ROWS = 64
"""A block of rows reads all packed weights, and belongs to one thread: with fewer of the same terms, or for each of the
machine's processors (whatever the number of threads is now, which no gradient shall depend on), single products are as
fast."""
MOST_TOGETHER = 24
"""Terms that a row may have."""
MOST_WEIGHTS = 8 << 20
"""Bytes of a layer's dense weights, from which single products are faster (benchmarks/feedforward.py)."""
MOST_OPENED = 32 << 20
"""Bytes of a layer's packed weights that are made dense together: the larger a layer, the less its products wait for
memory."""
NOT_ON_AMX = 2
"""The kernel's answer where it is not compiled for it."""


class Placed(NamedTuple):
    """A term, and the projection that it is added to."""

    term: LowRank
    part: int


@dataclass(frozen=True)
class FeedForward:
    """Frozen weights of gate, up [f, d] and down [d, f], what adapters add to their products, and the unit's kind."""

    weights: tuple[Tensor | Packed, ...]
    terms: tuple[Placed, ...]
    kind: str

    @property
    def features(self) -> int:
        return int(self.weights[DOWN].shape[1])

    def dense(self, dtype: torch.dtype) -> list[Tensor]:
        """The weights; of packed ones what they stand for, gone when `scratch_scope` ends."""
        return [w.dense().to(dtype) if isinstance(w, Packed) else w for w in self.weights]


def feedforward_of(x: Tensor, group: Sequence[Projection], down: Projection | None, kind: str) -> FeedForward | None:
    """The layer of gate, up and down for x [T, d], where it is best made in one step: else None."""
    if len(group) != 2 or down is None or not multiplies_all(x) or not _on_amx(x):
        return None
    layers = (*group, down)
    weights = tuple(layer.weight for layer in layers)
    if not all(map(_plain, layers)) or not all(_fits(weight, x) for weight in weights) or not _openable(weights):
        return None
    terms = tuple(Placed(term, part) for part, layer in enumerate(layers) for term in layer.terms)
    if not all(map(_plain_term, (term for term, _ in terms))) or not _dense_rows(len(x), terms):
        return None
    return FeedForward(weights, terms, kind)


def _on_amx(x: Tensor) -> bool:
    library = native.kernels("feedforward", x)
    return library is not None and bool(library.topwork_feedforward_level() == ON_AMX)


def _plain(layer: Projection) -> bool:
    """Whether it is a product and low-rank terms alone."""
    return layer.bias is None and not (layer.gains or layer.shifts or layer.input_gains)


def _fits(weight: Tensor | Packed, x: Tensor) -> bool:
    stands = isinstance(weight, Packed) or (weight.dtype == x.dtype and weight.stride(1) == 1)
    return stands and all(size % GRID == 0 for size in weight.shape)


def _openable(weights: Sequence[Tensor | Packed]) -> bool:
    """Whether what is packed is little enough to be made dense all at once."""
    size = sum(2 * w.shape[0] * w.shape[1] for w in weights)
    return size <= (MOST_OPENED if any(isinstance(w, Packed) for w in weights) else MOST_WEIGHTS)


def _plain_term(term: LowRank) -> bool:
    return term.dropout is None and all(x.dtype == torch.float32 and x.is_contiguous() for x in (term.a, term.b))


def _dense_rows(rows: int, terms: Sequence[Placed]) -> bool:
    """Whether rows with the same terms are many, and their terms few."""
    bounds = sorted({0, rows, *chain.from_iterable((term.start, term.stop) for term, _ in terms)})
    if rows < FEWEST_ROWS * max(len(bounds) - 1, os.cpu_count() or 1):
        return False
    return all(sum(term.start <= at < term.stop for term, _ in terms) <= MOST_TOGETHER for at in bounds)


def feedforward(
    x: Tensor, layer: FeedForward, prologue: Prologue = Identity(), keeps: bool = True, skip_forward: bool = False
) -> Tensor:
    """x [T, k] -> y [T, d]; `keeps` and `skip_forward` as `project` has them."""
    learned = [*(term.a for term, _ in layer.terms), *(term.b for term, _ in layer.terms)]
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *learned))
    return _FeedForward.apply(x, prologue, layer, keeps, skip_forward, wanted, *learned)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, prologue, layer, keeps, skip_forward, wanted, *learned):  # type: ignore[no-untyped-def]
        ctx.prologue, ctx.layer = prologue, layer
        with scratch_scope():
            n, kept = prologue.forward(x)
            out = (saved_empty if keeps else handoff_empty)(n, *n.shape)
            both = saved_empty(n, len(n), 2 * layer.features) if wanted else None
            inner = [saved_empty(n, term.stop - term.start, len(term.a)) for term, _ in layer.terms] if wanted else []
            run_forward(layer, n, both, inner, None if skip_forward else out)
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
            all_da, all_db = run_backward(layer, dout, both, inner, dn, _source(prologue, kept))
            dx = None if dn is None else prologue.backward(dn, kept)
        return dx, None, None, None, None, None, *all_da, *all_db


def run_forward(
    layer: FeedForward, n: Tensor, both: Tensor | None, inner: Sequence[Tensor], out: Tensor | None
) -> None:  # fmt: skip
    """From n [T, d] [gate | up] [T, 2 f], each term's S [rows, r], and y [T, d]: contiguous, or left out (none in
    `inner`)."""
    lines = [_line(placed, inner[number] if inner else None) for number, placed in enumerate(layer.terms)]
    if not _run(layer, n, both, out, lines):
        found = feedforward_reference(layer, n)
        for into, value in zip((both, out, *inner), found):
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
    if isinstance(norm, RmsNorm):
        return Source(_by_rows(kept[0]), norm, kept[1])
    return Source(_by_rows(prologue.recompute(kept)))


def run_backward(
    layer: FeedForward, dy: Tensor, both: Tensor, inner: Sequence[Tensor], dn: Tensor | None, source: Source
) -> tuple[list[Tensor], list[Tensor]]:
    """From dy [T, d] and what `run_forward` wrote the gradients of each term's A and B, and dn [T, d] where there is
    one."""
    all_da = [torch.empty_like(term.a) for term, _ in layer.terms]
    all_db = [torch.empty_like(term.b) for term, _ in layer.terms]
    lines = [_line(*of) for of in zip(layer.terms, inner, all_da, all_db)]
    if not _run(layer, dy, both, dn, lines, source):
        value, *found = feedforward_backward_reference(layer, dy, both, inner, source.made())
        if dn is not None:
            dn.copy_(value)
        for into, values in zip((all_da, all_db), found):
            for mine, its in zip(into, values):
                mine.copy_(its)
    return all_da, all_db


def feedforward_reference(layer: FeedForward, n: Tensor) -> list[Tensor]:
    """The truth of `run_forward` in fp32, rounded where that rounds: both, y and each S."""
    f, inner, weights = layer.features, [n.new_empty(0)] * len(layer.terms), layer.dense(n.dtype)

    def product(x: Tensor, part: int) -> Tensor:
        y = x.float() @ weights[part].float().t()
        for number, (term, its) in enumerate(layer.terms):
            if its == part:
                rows = slice(term.start, term.stop)
                inner[number] = (x[rows].float() @ term.a.to(x.dtype).float().t()).to(x.dtype)
                y[rows] += term.scaling * (inner[number].float() @ term.b.to(x.dtype).float().t())
        return y.to(x.dtype)

    both = torch.cat([product(n, GATE), product(n, UP)], 1)
    return [both, product(gated_reference(both[:, :f], both[:, f:], layer.kind), DOWN), *inner]


def feedforward_backward_reference(
    layer: FeedForward, dy: Tensor, both: Tensor, inner: Sequence[Tensor], n: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The truth of `run_backward`, with dn first."""
    f, dtype, weights = layer.features, dy.dtype, layer.dense(dy.dtype)
    gate, up = both[:, :f], both[:, f:]
    h, g = gated_reference(gate, up, layer.kind).float(), [dy.new_empty(0)] * len(layer.terms)

    def back(dout: Tensor, part: int) -> Tensor:
        dx = dout.float() @ weights[part].float()
        for number, (term, its) in enumerate(layer.terms):
            if its == part:
                rows = slice(term.start, term.stop)
                g[number] = (term.scaling * (dout[rows].float() @ term.b.to(dtype).float())).to(dtype)
                dx[rows] += g[number].float() @ term.a.to(dtype).float()
        return dx

    slopes = gated_backward_reference(back(dy, DOWN).to(dtype), gate, up, layer.kind)
    dn = (back(slopes[GATE], GATE) + back(slopes[UP], UP)).to(dtype)
    all_da, all_db = [], []
    for (term, part), s, slope in zip(layer.terms, inner, g):
        rows = slice(term.start, term.stop)
        all_da.append(slope.float().t() @ (h if part == DOWN else n.float())[rows])
        all_db.append(term.scaling * ((dy, *slopes)[(part + 1) % 3][rows].float().t() @ s.float()))
    return dn, all_da, all_db


def _room_for_gradient(dout: Tensor, prologue: Prologue) -> Tensor:
    """For dn [T, d]; where there is a prologue, nobody else takes it further."""
    if not isinstance(prologue, Identity):
        return scratch_empty(dout, *dout.shape)
    return handback_empty(dout, *dout.shape) if prologue.hands_back else torch.empty_like(dout)


def _line(placed: Placed, s: Tensor | None, da: Tensor | None = None, db: Tensor | None = None) -> bytes:
    """A term as the kernel has it."""
    term, part = placed
    addresses = [0 if x is None else x.data_ptr() for x in (term.a, term.b, s, da, db)]
    return TERM.pack(*addresses, len(term.a), term.start, term.stop, part, term.scaling)


def _by_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _told(source: Source | None) -> tuple[int, ...]:
    """As the kernel has it."""
    if source is None:
        return (0,) * 6
    x, norm, rstd = source
    if norm is None or rstd is None:
        return x.data_ptr(), x.stride(0), 0, 0, 0, 0
    kind = native.KINDS[norm.weight.dtype]
    return x.data_ptr(), x.stride(0), rstd.data_ptr(), norm.weight.data_ptr(), kind, int(norm.unit_offset)


def _run(
    layer: FeedForward, given: Tensor, both: Tensor | None, out: Tensor | None, lines: Sequence[bytes],
    source: Source | None = None,
) -> bool:  # fmt: skip
    """`given` and `out` are n and y or, with the source of n, dy and dn. Whether the kernel did it, which sees bare
    memory."""
    given = _by_rows(given)
    (rows, d), f = given.shape, layer.features
    weights = layer.dense(given.dtype)
    table = LAYER.pack(
        *(weight.data_ptr() for weight in weights), *(weight.stride(0) for weight in weights),
        given.data_ptr(), given.stride(0), 0 if both is None else both.data_ptr(), 0 if out is None else out.data_ptr(),
        2 * f, d, rows, d, f, KINDS.index(layer.kind), *_told(source),
    )  # fmt: skip
    library = native.kernels("feedforward", given) if given.dtype == torch.bfloat16 else None
    if library is None:
        return False
    threads = torch.get_num_threads()
    failed = library.topwork_feedforward(table, b"".join(lines), len(lines), int(source is not None), threads)
    if failed == NOT_ON_AMX:
        return False
    if failed:
        raise MemoryError(f"no memory for a feed-forward layer of {rows} rows")
    return True
