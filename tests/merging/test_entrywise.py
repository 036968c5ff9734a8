"""Methods that look at each entry of ΔW: against their definitions, written entry by entry, and against PEFT's."""

import itertools
import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from reference import entrywise as reference
from reference.measure import relative
from topwork.common.errors import RequestError
from topwork.merging.combine import entrywise, masks

ROUNDED = 16 * 2.0**-52
"""A value is rounded a few times in fp64: as it is weighted, added, enlarged, divided."""
CONVENTIONS = ("peft", "mergekit")
DENSITIES = (0.3, 0.55, 1.0)
WEIGHTS = {
    "ones": (1.0, 1.0, 1.0),
    "unequal": (0.7, 1.3, 0.2),
    "a negative one": (1.0, -0.8, 0.5),
    "a zero": (0.6, 0.0, 1.1),
}


def matrices(kind: str) -> Tensor:
    """Three ΔW in fp64, [3, out, in]."""
    shape = {"a row": (3, 1, 9), "a column": (3, 9, 1), "one entry": (3, 1, 1)}.get(kind, (3, 7, 11))
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if kind == "equal magnitudes":
        values = values.sign() * torch.tensor([1.0, 2.0])[(values.abs() > 0.7).long()].double()
    if kind == "a sum of zero":
        values[1] = -values[0]
        values[2] = 0
    if kind == "one is zero":
        values[1] = 0
    if kind == "all are zero":
        values[:] = 0
    return values


KINDS = ("odd", "a row", "a column", "one entry", "equal magnitudes", "a sum of zero", "one is zero", "all are zero")


@pytest.fixture(params=KINDS)
def deltas(request: pytest.FixtureRequest) -> Tensor:
    return matrices(request.param)


def drawn(deltas: Tensor, density: tuple[float, ...] = DENSITIES) -> Tensor:
    return masks.at_random(deltas, density, [masks.generator(0, "layer", f"{i}") for i in range(len(deltas))])


def same(found: Tensor, expected: reference.Rows, least: float) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert found.dtype == torch.float64
    assert found.shape == wanted.shape
    assert relative(found, wanted, least=least) < ROUNDED


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_ties(deltas: Tensor, convention: str) -> None:
    for weights in WEIGHTS.values():
        found = entrywise.ties(deltas, weights, DENSITIES, convention)
        same(found, reference.ties(deltas.tolist(), weights, DENSITIES, convention), float(deltas.norm()) + 1)


def test_magnitude_prune_and_breadcrumbs(deltas: Tensor) -> None:
    least = float(deltas.norm()) + 1
    for weights in WEIGHTS.values():
        found = entrywise.magnitude_prune(deltas, weights, DENSITIES)
        same(found, reference.magnitude_prune(deltas.tolist(), weights, DENSITIES), least)
        for gamma in (0.0, 0.1, 0.6):
            found = entrywise.breadcrumbs(deltas, weights, DENSITIES, gamma)
            same(found, reference.breadcrumbs(deltas.tolist(), weights, DENSITIES, gamma), least)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_dare_with_given_masks(deltas: Tensor, convention: str) -> None:
    mask, least = drawn(deltas), float(deltas.norm()) + 1
    for weights in WEIGHTS.values():
        for ours, definition in ((entrywise.dare, reference.dare), (entrywise.dare_ties, reference.dare_ties)):
            expected = definition(deltas.tolist(), weights, DENSITIES, mask.tolist(), convention)
            same(ours(deltas, weights, DENSITIES, mask, convention), expected, least)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_della_with_given_masks(deltas: Tensor, convention: str) -> None:
    mask = drawn(deltas)
    for weights in WEIGHTS.values():
        found = entrywise.della(deltas, weights, DENSITIES, mask, convention, 0.1)
        expected = reference.della(deltas.tolist(), weights, DENSITIES, mask.tolist(), convention, 0.1)
        same(found, expected, float(deltas.norm()) + 1)
    same(entrywise.chances(deltas[0], 0.4, 0.2), reference.chance(deltas[0].tolist(), 0.4, 0.2), 1)


def test_equal_entries_rise_in_their_order() -> None:
    assert entrywise.chances(torch.ones(1, 5000), 0.5, 0.2).diff().gt(0).all()


METHODS = ("ties", "magnitude_prune", "dare", "dare_ties", "della", "breadcrumbs")


def combined(
    method: str, deltas: Tensor, weights: Sequence[float], density: Sequence[float], mask: Tensor, convention: str
) -> Tensor:
    """Any of them, with the options that it has."""
    if method in ("magnitude_prune", "breadcrumbs"):
        return getattr(entrywise, method)(deltas, weights, density)
    if method == "ties":
        return entrywise.ties(deltas, weights, density, convention)
    more = (0.1,) if method == "della" else ()
    return getattr(entrywise, method)(deltas, weights, density, mask, convention, *more)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_identities(method: str, convention: str) -> None:
    values, way = matrices("odd"), partial(combined, method)
    mask, weights = drawn(values), (0.7, -1.3, 0.2)
    found = way(values, weights, DENSITIES, mask, convention)
    for order in itertools.permutations(range(3)):
        turned = way(
            values[list(order)], [weights[i] for i in order], [DENSITIES[i] for i in order], mask[list(order)],
            convention,
        )  # fmt: skip
        assert relative(turned, found) < ROUNDED  # of the sums' order: to the bit where the caller sorts

    two = way(values[:2], weights[:2], DENSITIES[:2], mask[:2], convention)
    assert torch.equal(way(values, (*weights[:2], 0.0), DENSITIES, mask, convention), two)
    assert torch.equal(way(values, (0.0, 0.0, 0.0), DENSITIES, mask, convention), torch.zeros_like(two))

    alone = way(values[:1], [1.0], [1.0], torch.ones_like(mask[:1]), convention)
    assert torch.equal(alone, values[0])
    negated = way(values[:1], [-1.0], [1.0], torch.ones_like(mask[:1]), convention)
    assert torch.equal(negated, -values[0])


def test_where_the_conventions_agree_and_where_they_do_not() -> None:
    values = matrices("odd")
    ours = {name: entrywise.ties(values, (1.0,) * 3, DENSITIES, name) for name in CONVENTIONS}
    assert relative(ours["peft"], ours["mergekit"]) < ROUNDED
    ours = {name: entrywise.ties(values, (1.0, 0.5, 0.5), DENSITIES, name) for name in CONVENTIONS}
    assert relative(ours["peft"], ours["mergekit"]) > 0.1


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_pefts_own_functions(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    values = matrices("odd")
    shares, mask = (density,) * 3, drawn(values, (density,) * 3)
    given = iter(range(100))
    monkeypatch.setattr(torch, "bernoulli", lambda input: mask[next(given) % 3].to(input))
    for weights in ((1.0, 1.0, 1.0), (0.7, 1.3, 0.2), (1.0, -0.8, 0.5)):
        theirs = list(values), torch.tensor(weights, dtype=torch.float64), density
        found = {
            "ties": entrywise.ties(values, weights, shares, "peft"),
            "magnitude_prune": entrywise.magnitude_prune(values, weights, shares),
            "dare_linear": entrywise.dare(values, weights, shares, mask, "peft"),
            "dare_ties": entrywise.dare_ties(values, weights, shares, mask, "peft"),
        }
        for name, ours in found.items():
            assert relative(ours, getattr(merge_utils, name)(*theirs)) < ROUNDED, name


def test_a_weight_of_zero_does_not_vote_here_and_does_in_peft() -> None:
    values = torch.tensor([[[1.0]], [[-3.0]]])
    assert entrywise.ties(values, (1.0, 0.0), (1.0, 1.0), "peft").item() == 1
    assert merge_utils.ties(list(values), torch.tensor([1.0, 0.0]), 0.999).item() == 0


def test_single_precision_stays() -> None:
    values = matrices("odd")
    for convention, method in itertools.product(CONVENTIONS, METHODS):
        way = partial(combined, method)
        exact = way(values, WEIGHTS["unequal"], DENSITIES, drawn(values), convention)
        found = way(values.float(), WEIGHTS["unequal"], DENSITIES, drawn(values), convention)
        assert found.dtype == torch.float32
        assert relative(found, exact) < 16 * 2.0**-24


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_densities_out_of_range(density: float) -> None:
    for method in METHODS:
        with pytest.raises(RequestError, match="over 0 and at most 1"):
            combined(method, matrices("odd"), (1, 1, 1), (0.5, density, 0.5), drawn(matrices("odd")), "peft")
    with pytest.raises(RequestError, match="2 densities for 3 adapters"):
        entrywise.ties(matrices("odd"), (1, 1, 1), (0.5, 0.5), "peft")


def test_epsilon_and_gamma_out_of_range() -> None:
    for epsilon in (-0.1, 0.2, 0.9, math.nan):
        with pytest.raises(RequestError, match=r"epsilon .* beside density 0.2"):
            entrywise.chances(matrices("odd")[0], 0.2, epsilon)
    for gamma in (-0.1, 1.0, math.nan):
        with pytest.raises(RequestError, match="gamma"):
            entrywise.breadcrumbs(matrices("odd"), (1, 1, 1), DENSITIES, gamma)
