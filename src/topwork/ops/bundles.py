"""The low-rank terms of a group of projections, gathered so that a pass needs few products, and those in few calls.

Terms whose A sees the same input make one bundle: one product gives S for all of them. All products of a stage are one
call (`ops/grouped.py`), whatever adapters they belong to. With dropout a bundle has an input of its own, which is made
again going backward.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topwork.ops.context import saved_empty, scratch_empty
from topwork.ops.dropout import Dropout, drop
from topwork.ops.grouped import Addend, Product, grouped_products, staged


@dataclass(frozen=True)
class LowRank:
    """s B A dropout(n) for the rows start:stop. a [r, in] and b [out, r] are the fp32 masters, which learn."""

    start: int
    stop: int
    a: Tensor
    b: Tensor
    scaling: float
    dropout: Dropout | None = None


class Placed(NamedTuple):
    """A term, and its columns in the group's output."""

    term: LowRank
    columns: slice


class Bundle(NamedTuple):
    """Terms with the same rows and the same A-input."""

    rows: slice
    terms: tuple[Placed, ...]
    dropout: Dropout | None

    @property
    def rank(self) -> int:
        return sum(self.ranks)

    @property
    def ranks(self) -> list[int]:
        """Of each term."""
        return [term.a.shape[0] for term, _ in self.terms]

    def by_term(self, x: Tensor, axis: int) -> Sequence[Tensor]:
        """x, which has the terms' ranks on an axis, as views: each term's part."""
        return x.split_with_sizes(self.ranks, axis) if len(self.terms) > 1 else (x,)

    def input(self, n: Tensor) -> Tensor:
        """What the terms' A see of n [T, in]."""
        rows = n[self.rows]
        return rows if self.dropout is None else drop(rows, self.dropout, scratch_empty(rows, *rows.shape))


def stacked(bundles: Sequence[Bundle]) -> list[Tensor]:
    """Of each bundle its terms' A under one another [R, in], in fp32; gathered for all bundles at once."""
    apart = [bundle for bundle in bundles if len(bundle.terms) > 1]
    parts = [placed.term.a for bundle in apart for placed in bundle.terms]
    gathered = iter(torch.cat(parts).split_with_sizes([bundle.rank for bundle in apart]) if parts else ())
    return [next(gathered) if len(bundle.terms) > 1 else bundle.terms[0].term.a for bundle in bundles]


def bundled(terms: Iterable[tuple[LowRank, slice]]) -> tuple[Bundle, ...]:
    """The bundles of a group's terms, each with its columns in the group's output."""
    shared: dict[tuple[Any, ...], list[Placed]] = defaultdict(list)
    for term, columns in terms:
        drops = term.dropout and (term.dropout.p, term.dropout.key)  # rows have the same seeds for all
        shared[term.start, term.stop, drops].append(Placed(term, columns))
    return tuple(
        Bundle(slice(start, stop), tuple(there), there[0].term.dropout) for (start, stop, _), there in shared.items()
    )


def inner_products(
    n: Tensor, bundles: Sequence[Bundle], out: Tensor | None = None, held: bool = False
) -> list[Tensor]:  # fmt: skip
    """Each bundle's S [rows, R], which the backward pass needs; with `out` [T, outputs] that is made of every term, and
    zero where there is none, or is added to where something is `held` there."""
    inner, products = [], []
    for bundle, a in zip(bundles, stacked(bundles)):
        rows = bundle.input(n)
        inner.append(saved_empty(n, rows.shape[0], a.shape[0]))
        products.append(Product(rows, a.t(), inner[-1]))
    _run([products, *(() if out is None else _written(bundles, inner, out, held))])
    return inner


def write_terms(bundles: Sequence[Bundle], inner: Sequence[Tensor], out: Tensor, held: bool = False) -> None:
    """The latter alone, from each bundle's S."""
    _run(_written(bundles, inner, out, held))


def _run(stages: Sequence[Sequence[Product]]) -> None:
    for stage in staged(stages):
        stage()


def _written(bundles: Sequence[Bundle], inner: Sequence[Tensor], out: Tensor, held: bool) -> list[list[Product]]:
    added = []
    for bundle, s in zip(bundles, inner):
        for (term, columns), own in zip(bundle.terms, bundle.by_term(s, 1)):
            product = Product(own, term.b.t(), out[bundle.rows, columns], term.scaling, 1)
            added.append(((bundle.rows.start, bundle.rows.stop, columns.start), product))
    return _turns(added) if held else _fresh(_turns(added), out)


def _fresh(turns: list[list[Product]], out: Tensor) -> list[list[Product]]:
    """Products that add to an `out` which holds nothing yet: where one turn fills it all they overwrite it, else it is
    zero first."""
    if len(turns) == 1 and sum(product.out.numel() for product in turns[0]) == out.numel():
        return [[product._replace(beta=0) for product in turns[0]]]
    out.zero_()
    return turns


def addends(bundles: Sequence[Bundle], inner: Sequence[Tensor], columns: slice) -> tuple[Addend, ...]:
    """What the terms add to these columns of the group's output, for the product that makes them."""
    found = []
    for bundle, s in zip(bundles, inner):
        for (term, there), own in zip(bundle.terms, bundle.by_term(s, 1)):
            first, stop = max(there.start, columns.start), min(there.stop, columns.stop)
            if first < stop:
                b = term.b if stop - first == len(term.b) else term.b[first - there.start : stop - there.start]
                found.append(Addend(own, b.t(), bundle.rows.start, first - columns.start, term.scaling))
    return tuple(found)


def gradient_addends(
    bundles: Sequence[Bundle], g: Sequence[Tensor], all_a: Sequence[Tensor], columns: slice
) -> tuple[Addend, ...]:
    """The same of the input's gradient, from each bundle's G and stacked A: of bundles without dropout."""
    return tuple(Addend(slopes, a[:, columns], bundle.rows.start, 0) for bundle, slopes, a in zip(bundles, g, all_a))


def term_gradients(
    n: Tensor | None, bundles: Sequence[Bundle], inner: Sequence[Tensor], dy: Tensor, dn: Tensor | None,
    weight: Tensor | None = None, held: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """The gradients of every A (none without n [T, in]: `a_gradients`) and of every B, bundle by bundle, and each
    bundle's G [rows, R]. dn [T, in], where there is one, becomes the terms' share; with `weight` [outputs, in] dy
    weight and that share, rounded once; where something is `held` there already, that and their share."""
    g = [scratch_empty(s, *s.shape) for s in inner]
    first, third = [], []
    second, all_da = ([], []) if n is None else _of_a(n, bundles, g)
    all_db: list[Tensor] = []
    shares: list[tuple[slice, Dropout, Tensor]] = []
    joined: list[Addend] = []
    for bundle, s, slopes, a in zip(bundles, inner, g, stacked(bundles)):
        parts = zip(bundle.terms, bundle.by_term(s, 1), bundle.by_term(slopes, 1))
        for (term, columns), own_s, own_slopes in parts:
            own, db = dy[bundle.rows, columns], torch.empty_like(term.b)
            first.append(Product(own, term.b, own_slopes, term.scaling))
            second.append(Product(own.t(), own_s, db, term.scaling))
            all_db.append(db)
        if dn is None:
            continue
        if bundle.dropout is not None:
            shares.append((bundle.rows, bundle.dropout, scratch_empty(dn, len(s), dn.shape[1])))
            second.append(Product(slopes, a, shares[-1][2]))
        elif weight is not None:
            joined.append(Addend(slopes, a, bundle.rows.start, 0))
        else:
            product = Product(slopes, a, dn[bundle.rows], beta=1)
            third.append(((bundle.rows.start, bundle.rows.stop), product))
    turns = _turns(third)
    whole_share = not (held or third) and [len(share) for _, _, share in shares] == [len(dy)]
    if dn is not None and not held and (third or shares) and not whole_share:
        turns = _fresh(turns, dn)
    if dn is not None and weight is not None:
        whole = Product(dy, weight, dn, beta=int(bool(shares)), addends=tuple(joined))
        if not shares:
            second.insert(0, whole)
    _run([first, [*second, *(turns[0] if turns else ())], *turns[1:]])
    if dn is not None:
        for rows, dropout, share in shares:
            drop(share, dropout, dn[rows], add=not whole_share)
        if weight is not None and shares:
            grouped_products([whole])
    return all_da, all_db, g


def a_gradients(n: Tensor, bundles: Sequence[Bundle], g: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of every A from each bundle's G, where n is at hand only later."""
    products, all_da = _of_a(n, bundles, g)
    grouped_products(products)
    return all_da


def _of_a(n: Tensor, bundles: Sequence[Bundle], g: Sequence[Tensor]) -> tuple[list[Product], list[Tensor]]:
    products: list[Product] = []
    all_da: list[Tensor] = []
    for bundle, slopes in zip(bundles, g):
        da = n.new_empty(bundle.rank, n.shape[1], dtype=bundle.terms[0].term.a.dtype)
        products.append(Product(slopes.t(), bundle.input(n), da))
        all_da += bundle.by_term(da, 0)
    return products, all_da


def _turns(added: Sequence[tuple[tuple[int, ...], Product]]) -> list[list[Product]]:
    """Products that add to places, which begin with their rows start and stop, as stages: those of one place one after
    the other, and all of them where rows that differ overlap."""
    if not added:
        return []
    ranges = sorted({place[:2] for place, _ in added})
    apart = all(one[1] <= other[0] for one, other in pairwise(ranges))
    turns: dict[int, list[Product]] = defaultdict(list)
    met: Counter[tuple[int, ...]] = Counter()
    for number, (place, product) in enumerate(added):
        turns[met[place] if apart else number].append(product)
        met[place] += 1
    return list(turns.values())
