"""The low-rank terms of a group of projections, gathered so that a pass needs few products, and those in few calls.

Terms whose A sees the same input make one bundle: one product gives S for all of them. Bundles without dropout make one
batch: all their products of a stage are one call (`ops/grouped.py`), whatever adapters they belong to. With dropout an
input is made for each projection, and a projection's bundles make a batch, so that one such input is held at a time.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from topwork.ops.grouped import Product, grouped_products
from topwork.ops.kept import kept_empty


@dataclass(frozen=True)
class LowRank:
    """s B A dropout(n) for the rows start:stop. a [r, in] and b [out, r] are the fp32 masters, which learn."""

    start: int
    stop: int
    a: Tensor
    b: Tensor
    scaling: float
    dropout: float = 0.0


@dataclass(frozen=True)
class Member:
    """A term's place: its columns in the group's output, and in its bundle's S."""

    columns: slice
    ranks: slice
    scaling: float
    only_backward: bool


@dataclass(frozen=True)
class Bundle:
    """Terms with the same rows and the same A-input. `masters` is where theirs lie: A and B in turns."""

    rows: slice
    members: tuple[Member, ...]
    dropout: float
    masters: slice

    @property
    def rank(self) -> int:
        return int(self.members[-1].ranks.stop)

    def stacked(self, masters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The members' A under one another [R, in]."""
        parts = [a.to(dtype) for a in masters[self.masters][::2]]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def each(self, masters: Sequence[Tensor]) -> Iterator[tuple[Member, Tensor]]:
        """The members and their B."""
        return zip(self.members, masters[self.masters][1::2])


@dataclass(frozen=True)
class Batch:
    """Bundles whose products of a stage are one call; `apart`: where their rows differ, they do not overlap."""

    bundles: tuple[Bundle, ...]
    apart: bool


Placed = tuple[slice, LowRank, bool]
"""A term, its columns in the group's output, and whether its product is left out going forward."""


def batches_of(terms: Iterable[tuple[int, Placed]]) -> tuple[tuple[Batch, ...], list[Tensor]]:
    """Terms with their projection's number, in batches; and their A and B in turns."""
    shared: dict[int | None, dict[tuple[Any, ...], list[Placed]]] = defaultdict(lambda: defaultdict(list))
    for number, place in terms:
        term = place[1]
        shared[number if term.dropout else None][term.start, term.stop, term.dropout].append(place)
    batches: list[Batch] = []
    masters: list[Tensor] = []
    for bundles in shared.values():
        made = []
        for (start, stop, dropout), places in bundles.items():
            first = len(masters)
            members = tuple(_members(places))
            masters += [master for _, term, _ in places for master in (term.a, term.b)]
            made.append(Bundle(slice(start, stop), members, dropout, slice(first, len(masters))))
        ranges = sorted({(bundle.rows.start, bundle.rows.stop) for bundle in made})
        batches.append(Batch(tuple(made), all(one[1] <= other[0] for one, other in pairwise(ranges))))
    return tuple(batches), masters


def _members(places: Iterable[Placed]) -> Iterator[Member]:
    rank = 0
    for columns, term, only_backward in places:
        ranks = slice(rank, rank + term.a.shape[0])
        rank = ranks.stop
        yield Member(columns, ranks, term.scaling, only_backward)


Inner = tuple[Tensor, Tensor | None]
"""S [rows, R] of a bundle, and its dropout's factors [rows, in]."""


def add_terms(n: Tensor, batches: Sequence[Batch], masters: Sequence[Tensor], out: Tensor) -> list[Inner]:
    """Adds every term to out [T, outputs]; what the backward pass needs, one for each bundle."""
    return [inner for batch in batches for inner in _add_batch(n, batch, masters, out)]


def _add_batch(n: Tensor, batch: Batch, masters: Sequence[Tensor], out: Tensor) -> list[Inner]:
    found, first, second = [], [], []
    for bundle in batch.bundles:
        rows, noise = _dropped(n[bundle.rows], bundle.dropout)
        s = kept_empty(n, rows.shape[0], bundle.rank)
        found.append((s, noise))
        first.append(Product(rows, bundle.stacked(masters, n.dtype).t(), s))
        for member, b in bundle.each(masters):
            if not member.only_backward:
                part = out[bundle.rows, member.columns]
                product = Product(s[:, member.ranks], b.to(n.dtype).t(), part, member.scaling, 1)
                second.append(((bundle.rows.start, bundle.rows.stop, member.columns.start), product))
    grouped_products(first)
    _in_turns(second, batch.apart)
    return found


def term_gradients(
    n: Tensor, batches: Sequence[Batch], masters: Sequence[Tensor], inner: Sequence[Inner], dy: Tensor,
    dn: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """The masters' gradients; adds the terms' share to dn [T, in] where there is one."""
    found, at = [], 0
    for batch in batches:
        found += _batch_gradients(n, batch, masters, inner[at : at + len(batch.bundles)], dy, dn)
        at += len(batch.bundles)
    return found


def _batch_gradients(
    n: Tensor, batch: Batch, masters: Sequence[Tensor], inner: Sequence[Inner], dy: Tensor, dn: Tensor | None
) -> list[Tensor]:
    g = [torch.empty_like(s) for s, _ in inner]
    first, second, third, found = [], [], [], []
    for bundle, (s, noise), slopes in zip(batch.bundles, inner, g):
        rows = n[bundle.rows] if noise is None else n[bundle.rows] * noise
        da = masters[bundle.masters.start].new_empty(bundle.rank, n.shape[1])
        second.append(Product(slopes.t(), rows, da))
        for member, b in bundle.each(masters):
            own, db = dy[bundle.rows, member.columns], torch.empty_like(b)
            first.append(Product(own, b.to(dy.dtype), slopes[:, member.ranks], member.scaling))
            second.append(Product(own.t(), s[:, member.ranks], db, member.scaling))
            found += [da[member.ranks], db]
        if dn is not None and noise is None:
            product = Product(slopes, bundle.stacked(masters, dy.dtype), dn[bundle.rows], beta=1)
            third.append(((bundle.rows.start, bundle.rows.stop), product))
    grouped_products(first)
    grouped_products(second)
    _in_turns(third, batch.apart)
    for bundle, (_, noise), slopes in zip(batch.bundles, inner, g):
        if dn is not None and noise is not None:
            share = torch.empty_like(noise)
            grouped_products([Product(slopes, bundle.stacked(masters, dy.dtype), share)])
            dn[bundle.rows].addcmul_(share, noise)
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


def _dropped(rows: Tensor, share: float) -> tuple[Tensor, Tensor | None]:
    """Rows with some values dropped and the others scaled up, and the factors; drawn as torch's dropout draws them."""
    if not share:
        return rows, None
    noise = kept_empty(rows, *rows.shape).bernoulli_(1 - share).div_(1 - share)
    return rows * noise, noise
