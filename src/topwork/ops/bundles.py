"""The low-rank terms of a group of projections, gathered so that a pass needs few products, and those in few calls.

Terms whose A sees the same input make one bundle: one product gives S for all of them. All products of a stage are one
call (`ops/grouped.py`), whatever adapters they belong to. With dropout a bundle has an input of its own, which is made
again going backward.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from topwork.ops.context import saved_empty, scratch_empty
from topwork.ops.dropout import Dropout, drop
from topwork.ops.grouped import Product, grouped_products


@dataclass(frozen=True)
class LowRank:
    """s B A dropout(n) for the rows start:stop. a [r, in] and b [out, r] are the fp32 masters, which learn."""

    start: int
    stop: int
    a: Tensor
    b: Tensor
    scaling: float
    dropout: Dropout | None = None


@dataclass(frozen=True)
class Member:
    """A term's place: its columns in the group's output, and in its bundle's S."""

    columns: slice
    ranks: slice
    scaling: float


@dataclass(frozen=True)
class Bundle:
    """Terms with the same rows and the same A-input. `masters` is where theirs lie: A and B in turns."""

    rows: slice
    members: tuple[Member, ...]
    dropout: Dropout | None
    masters: slice

    @property
    def rank(self) -> int:
        return int(self.members[-1].ranks.stop)

    def input(self, n: Tensor) -> Tensor:
        """What the members' A see of n [T, in]."""
        rows = n[self.rows]
        return rows if self.dropout is None else drop(rows, self.dropout, scratch_empty(rows, *rows.shape))

    def stacked(self, masters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The members' A under one another [R, in]."""
        parts = [a.to(dtype) for a in masters[self.masters][::2]]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def each(self, masters: Sequence[Tensor]) -> Iterator[tuple[Member, Tensor]]:
        """The members and their B."""
        return zip(self.members, masters[self.masters][1::2])


@dataclass(frozen=True)
class Bundles:
    """Those of a group; `apart`: where their rows differ, they do not overlap."""

    all: tuple[Bundle, ...]
    apart: bool


Placed = tuple[slice, LowRank]
"""A term and its columns in the group's output."""


def bundled(terms: Iterable[Placed]) -> tuple[Bundles, list[Tensor]]:
    """The terms' bundles, and their A and B in turns."""
    shared: dict[tuple[Any, ...], list[Placed]] = defaultdict(list)
    for place in terms:
        term = place[1]
        drops = term.dropout and (term.dropout.p, term.dropout.key)  # rows have the same seeds for all
        shared[term.start, term.stop, drops].append(place)
    made: list[Bundle] = []
    masters: list[Tensor] = []
    for (start, stop, _), places in shared.items():
        first = len(masters)
        masters += [master for _, term in places for master in (term.a, term.b)]
        bundle = Bundle(slice(start, stop), tuple(_members(places)), places[0][1].dropout, slice(first, len(masters)))
        made.append(bundle)
    ranges = sorted({(bundle.rows.start, bundle.rows.stop) for bundle in made})
    return Bundles(tuple(made), all(one[1] <= other[0] for one, other in pairwise(ranges))), masters


def _members(places: Iterable[Placed]) -> Iterator[Member]:
    rank = 0
    for columns, term in places:
        ranks = slice(rank, rank + term.a.shape[0])
        rank = ranks.stop
        yield Member(columns, ranks, term.scaling)


def inner_products(n: Tensor, bundles: Bundles, masters: Sequence[Tensor]) -> list[Tensor]:
    """Each bundle's S [rows, R], which the backward pass needs."""
    inner, products = [], []
    for bundle in bundles.all:
        rows = bundle.input(n)
        inner.append(saved_empty(n, rows.shape[0], bundle.rank))
        products.append(Product(rows, bundle.stacked(masters, n.dtype).t(), inner[-1]))
    grouped_products(products)
    return inner


def add_terms(bundles: Bundles, masters: Sequence[Tensor], inner: Sequence[Tensor], out: Tensor) -> None:
    """Adds every term to out [T, outputs], from each bundle's S."""
    placed = []
    for bundle, s in zip(bundles.all, inner):
        for member, b in bundle.each(masters):
            part = out[bundle.rows, member.columns]
            product = Product(s[:, member.ranks], b.to(s.dtype).t(), part, member.scaling, 1)
            placed.append(((bundle.rows.start, bundle.rows.stop, member.columns.start), product))
    _in_turns(placed, bundles.apart)


def term_gradients(
    n: Tensor, bundles: Bundles, masters: Sequence[Tensor], inner: Sequence[Tensor], dy: Tensor, dn: Tensor | None
) -> list[Tensor]:
    """The masters' gradients; adds the terms' share to dn [T, in] where there is one."""
    g = [torch.empty_like(s) for s in inner]
    first, second, third, found = [], [], [], []
    shares: list[tuple[slice, Dropout, Tensor]] = []
    for bundle, s, slopes in zip(bundles.all, inner, g):
        da = masters[bundle.masters.start].new_empty(bundle.rank, n.shape[1])
        second.append(Product(slopes.t(), bundle.input(n), da))
        for member, b in bundle.each(masters):
            own, db = dy[bundle.rows, member.columns], torch.empty_like(b)
            first.append(Product(own, b.to(dy.dtype), slopes[:, member.ranks], member.scaling))
            second.append(Product(own.t(), s[:, member.ranks], db, member.scaling))
            found += [da[member.ranks], db]
        if dn is None:
            continue
        a = bundle.stacked(masters, dy.dtype)
        if bundle.dropout is None:
            product = Product(slopes, a, dn[bundle.rows], beta=1)
            third.append(((bundle.rows.start, bundle.rows.stop), product))
        else:
            shares.append((bundle.rows, bundle.dropout, scratch_empty(dn, len(s), dn.shape[1])))
            second.append(Product(slopes, a, shares[-1][2]))
    grouped_products(first)
    grouped_products(second)
    _in_turns(third, bundles.apart)
    if dn is not None:
        for rows, dropout, share in shares:
            drop(share, dropout, dn[rows], add=True)
    return found


def _in_turns(placed: Sequence[tuple[tuple[int, ...], Product]], apart: bool) -> None:
    """Products that add to places: those of one place one after the other, and all where places may overlap."""
    turns: dict[int, list[Product]] = defaultdict(list)
    met: Counter[tuple[int, ...]] = Counter()
    for number, (place, product) in enumerate(placed):
        turns[met[place] if apart else number].append(product)
        met[place] += 1
    for products in turns.values():
        grouped_products(products)
