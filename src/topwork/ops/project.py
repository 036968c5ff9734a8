"""A group of linear layers with one input, behind a cheap prologue, with what adapters learn: forward and backward by
hand.

    n = prologue(x)                                    computed again going backward, never kept
    S = n A'                                           one product for all A of the group, kept (r values a token)
    y = [b1 + s1 S1 B1' + n W1' | ... + n W2' + ...]   one buffer, so what follows takes its parts without a copy

    G = s dy B    dA = G' n    dB = s dy' S    dn = dy W + G A        dy B is computed once and serves dA and dn

Vectors that learn multiply outputs, are added to them, or multiply inputs (`ops/vectors.py`): what those of outputs
pass back is dy above, and W's n and dn are those of inputs. A gain on outputs needs y again: kept, or made once more
where nobody else would keep it and the input is not wider than it.

In 16 bits terms come first, and W's product is added before it is rounded: the other way round what an adapter brings
in its first steps would be lost, forward and backward (benchmarks/small_terms.py).

W is dense or packed, and frozen. The terms of one adapter hold for a range of rows (`ops/batch.py`'s segments), and
those of all adapters run together (`ops/bundles.py`). With dropout (`ops/dropout.py`) A sees n with values dropped, and
G A loses the same. LoRA costs six small products (two forward, four backward), 6 r (in + out) FLOPs a token; the
plain-torch truth is `adapters/methods/lora/lora.py`'s `forward`, which autograd differentiates.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topwork.ops.bundles import (
    Bundle,
    a_gradients,
    addends,
    bundled,
    gradient_addends,
    inner_products,
    stacked,
    term_gradients,
    write_terms,
)
from topwork.ops.context import handback_empty, handoff_empty, saved_empty, scratch_empty, scratch_scope
from topwork.ops.grouped import GRID, Addend, Product, grouped_products, multiplies_all
from topwork.ops.packed import Packed
from topwork.ops.parts import openable, opened_whole
from topwork.ops.projection import Placed, Projection, base_gradient, base_products, begun, biases, side_by_side
from topwork.ops.prologues import Identity, Prologue
from topwork.ops.quantized_linear import write_output
from topwork.ops.vectors import PlacedGain, PlacedShift, Vectors


def project(
    x: Tensor,
    group: Sequence[Projection],
    prologue: Prologue = Identity(),
    keeps: bool = True,
    skip_forward: bool = False,
    joined: Projection | None = None,
) -> Tensor:
    """x [T, k] -> [T, sum of the group's outputs], the group's products side by side. Where there are gains, the
    backward pass writes over them (or over others like them). What comes next either keeps them or is done with them at
    once, as `keeps` says. Gains on inputs are for a projection that stands alone: the group has one input.

    With `skip_forward` the products are left out and zeros returned, for a layer that runs again going backward and
    whose output no gradient needs; gains need theirs. The backward pass is the same. `joined` is the weights and the
    biases of the whole group, dense and behind one another, where somebody holds them so: one product for all.
    """
    placed = side_by_side(group)
    bundles = bundled((term, columns) for projection, columns in placed for term in projection.terms)
    vectors = _vectors(placed)
    assert not (skip_forward and vectors.gains), "the gradient of a gain needs the product"
    assert len(group) == 1 or not vectors.inputs, "a group has one input, and a gain on it is one projection's"
    terms = [placed.term for bundle in bundles for placed in bundle.terms]
    learned = [*(term.a for term in terms), *(term.b for term in terms), *vectors.learned]
    base = placed if joined is None else side_by_side((joined,))
    whole = _Group(base, _made_here(x, base), bundles, vectors)
    return _Project.apply(x, prologue, whole, keeps, skip_forward, *learned)


_NO_VECTORS = Vectors()


def _vectors(placed: Placed) -> Vectors:
    if not any(projection.input_gains or projection.shifts or projection.gains for projection, _ in placed):
        return _NO_VECTORS
    return Vectors(
        tuple(gain for projection, _ in placed for gain in projection.input_gains),
        tuple(PlacedShift(shift, columns) for projection, columns in placed for shift in projection.shifts),
        tuple(
            PlacedGain(gain, columns, None if gain.with_bias else projection.bias)
            for projection, columns in placed
            for gain in projection.gains
        ),
    )


class _Group(NamedTuple):
    """A group as both passes take it: its frozen layers, whether all are multiplied by `grouped_products`, which adds
    the terms on the way, and what adapters have there."""

    base: Placed
    joins: bool
    bundles: tuple[Bundle, ...]
    vectors: Vectors

    @property
    def terms_first(self) -> bool:
        """Whether the output is made of the terms first, and the base's products are added to them: a term added to an
        output that is rounded already is lost where it is less than half of what this resolves."""
        return not self.joins and bool(self.bundles)

    def opened(self) -> "_Group":
        """With small packed weights dense and joined, inside of `scratch_scope`: one product, whose gradient is rounded
        once, as that of dense ones is. Not where some begin beside the grid that addends have: joined, their terms
        would be rounded before the product is."""
        weights = [projection.weight for projection, _ in self.base if isinstance(projection.weight, Packed)]
        if not self.joins or len(weights) < len(self.base) or not openable(weights):
            return self
        if any(columns.start % GRID for _, columns in self.base):
            return self
        whole = opened_whole(weights)
        biases = [projection.bias for projection, _ in self.base]
        given = next((bias for bias in biases if bias is not None), None)
        if given is not None:
            rows = [given.new_zeros(w.shape[0]) if bias is None else bias for w, bias in zip(weights, biases)]
            return self._replace(base=side_by_side((Projection(whole, torch.cat(rows)),)))
        return self._replace(base=side_by_side((Projection(whole),)))

    @property
    def inputs(self) -> int:
        return int(self.base[0][0].weight.shape[1])

    @property
    def outputs(self) -> int:
        return int(self.base[-1][1].stop)


def _made_here(x: Tensor, base: Placed) -> bool:
    """Whether these layers are better multiplied here: those that are packed or of x's type."""

    def fits(layer: Projection) -> bool:
        bias = layer.bias is None or layer.bias.dtype in (x.dtype, torch.float32)
        return bias and (isinstance(layer.weight, Packed) or layer.weight.dtype == x.dtype)

    return multiplies_all(x) and all(fits(layer) for layer, _ in base)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, prologue, group, keeps, skip_forward, *learned):  # type: ignore[no-untyped-def]
        ctx.prologue, ctx.group = prologue, group
        gains = group.vectors.gains
        with scratch_scope():
            group = group.opened()
            n, kept = prologue.forward(x)
            shape = n.shape[0], group.outputs
            keeps = keeps or (bool(gains) and n.shape[1] > shape[1])
            out = (saved_empty if keeps else handoff_empty)(n, *shape)
            into = out if group.terms_first and not skip_forward else None
            inner = inner_products(n, group.bundles, into, into is not None and begun(group.base, into))
            if skip_forward:
                out.zero_()
            else:
                _write(group, group.vectors.scaled(n, x), inner, out)
        ctx.counts = len(kept), len(inner)
        ctx.out = out.detach() if gains and keeps else None  # not saved: what follows may write into it
        ctx.save_for_backward(*kept, *inner, *learned)  # what learns, for torch to refuse it changed meanwhile
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        kept, inner, _ = _split(ctx.saved_tensors, *ctx.counts)
        wants_x, prologue, vectors = ctx.needs_input_grad[0], ctx.prologue, ctx.group.vectors
        all_da: list[Tensor] = []
        all_db: list[Tensor] = []
        of_inputs: list[Tensor] = []
        with scratch_scope():
            group = ctx.group.opened()
            out, ctx.out = ctx.out, None
            if vectors.gains and out is None:
                out = scratch_empty(dout, *dout.shape)
                if group.terms_first:
                    write_terms(group.bundles, inner, out, begun(group.base, out))
                _write(group, vectors.scaled(prologue.recompute(kept), kept[0]), inner, out)
            dout, of_outputs = vectors.output_gradients_(dout, out)
            dn = _room_for_gradient(dout, group, prologue) if wants_x or vectors.inputs else None
            late = prologue.late_input(kept) if inner and wants_x and not vectors.inputs else None
            weight, with_last = _where_terms_join(group) if inner and not vectors.inputs else (None, False)
            base_first = bool(vectors.inputs) or not inner
            if dn is not None and base_first:
                base_gradient(dout, group.base, dn, group.joins)
            if inner or vectors.inputs:
                n = prologue.recompute(kept) if late is None else None
                of_inputs = vectors.input_gradients_(n, dn) if n is not None else []
                into = dn if wants_x and not with_last else None
                all_da, all_db, g = term_gradients(n, group.bundles, inner, dout, into, weight, base_first)
                del n
            if dn is not None and weight is None and not base_first:
                terms = partial(gradient_addends, group.bundles, g, stacked(group.bundles)) if with_last else None
                base_gradient(dout, group.base, dn, group.joins, not with_last, terms)
            dx = prologue.backward(dn, kept, late) if wants_x else None
            if late is not None:
                all_da = a_gradients(late, group.bundles, g)
        return dx, None, None, None, None, *all_da, *all_db, *of_inputs, *of_outputs


def _where_terms_join(group: _Group) -> tuple[Tensor | None, bool]:
    """Which product of the input's gradient takes the terms' along before it is rounded: that with the one weight, in
    one call with the gradients of A and B; else the last layer's, or none."""
    if not group.joins:
        return None, False
    if len(group.base) == 1 and isinstance(weight := group.base[0][0].weight, Tensor):
        return weight, False
    return None, all(bundle.dropout is None for bundle in group.bundles)


def _write(group: _Group, n: Tensor, inner: Sequence[Tensor], out: Tensor) -> None:
    """The outputs of a group, from n as the base sees it and each bundle's S; `out` holds the terms where these come
    first."""
    if not group.joins:
        base_products(n, group.base, out, group.terms_first)
    dense: list[Product] = []
    for layer, at in group.base if group.joins else ():

        def added(rows: slice, layer: Projection = layer, at: slice = at) -> tuple[Addend, ...]:
            columns = slice(at.start + rows.start, at.start + rows.stop)
            return (*biases(n, layer, rows), *addends(group.bundles, inner, columns))

        if isinstance(layer.weight, Packed):
            write_output(n, layer.weight, None, out[:, at], terms=added)
        else:
            dense.append(Product(n, layer.weight.t(), out[:, at], addends=added(slice(0, layer.outputs))))
    grouped_products(dense)
    group.vectors.change_(out)


def _room_for_gradient(dout: Tensor, group: _Group, prologue: Prologue) -> Tensor:
    """For dout W of the whole group [T, in]; where there is a prologue, nobody else takes it further."""
    shape = dout.shape[0], group.inputs
    if not isinstance(prologue, Identity):
        return scratch_empty(dout, *shape)
    return handback_empty(dout, *shape) if prologue.hands_back else dout.new_empty(shape)


def _split(tensors: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    parts, at = [], 0
    for size in sizes:
        parts.append(tensors[at : at + size])
        at += size
    return [*parts, tensors[at:]]
