"""KnOTS: in factors what the dense matrices side by side give."""

import pytest
import torch

from reference import entrywise as reference
from reference.measure import relative
from topwork.merging.combine import entrywise, masks
from topwork.merging.combine.knots import aligned, knots
from topwork.merging.deltas import LowRankDelta

DENSITIES = (0.5, 0.3, 1.0)
FAR = 1e-10
"""Far above rounding in fp64, far below what a wrong direction gives."""


def sources(ranks: tuple[int, ...] = (2, 3, 1), shape: tuple[int, int] = (9, 14)) -> list[LowRankDelta]:
    torch.manual_seed(4)
    return [
        LowRankDelta(torch.randn(shape[0], r, dtype=torch.float64), torch.randn(r, shape[1], dtype=torch.float64))
        for r in ranks
    ]


@pytest.mark.parametrize("convention", ["peft", "mergekit"])
@pytest.mark.parametrize(("ranks", "shape"), [((2, 3, 1), (9, 14)), ((2, 3, 1), (14, 4)), ((4, 4, 4), (5, 7))])
def test_the_dense_definition(convention: str, ranks: tuple[int, ...], shape: tuple[int, int]) -> None:
    given, weights = sources(ranks, shape), (0.7, 1.3, 0.4)
    found = knots(given, lambda blocks: entrywise.ties(blocks, weights, DENSITIES, convention))
    dense = [delta.dense().tolist() for delta in given]
    expected = torch.tensor(reference.knots_ties(dense, weights, DENSITIES, convention), dtype=torch.float64)
    assert found.rank <= min(sum(ranks), shape[0])
    assert relative(found.dense(), expected) < FAR


def test_the_directions_are_common_and_complete() -> None:
    given = sources()
    u, blocks = aligned(given)
    assert relative(u.t() @ u, torch.eye(6, dtype=torch.float64)) < FAR
    for delta, block in zip(given, blocks):
        assert relative(u @ block, delta.dense()) < FAR


def test_the_same_directions_are_counted_once() -> None:
    given = sources((3,))
    u, blocks = aligned([given[0], LowRankDelta(2 * given[0].b, given[0].a)])
    assert u.shape == (9, 3)
    assert relative(blocks[1], 2 * blocks[0]) < FAR


def test_identities() -> None:
    given = sources()
    alone = knots(given[:1], lambda blocks: entrywise.ties(blocks, [1.0], [1.0], "mergekit"))
    assert relative(alone.dense(), given[0].dense()) < FAR
    one = knots(given, lambda blocks: entrywise.ties(blocks, (1.0, 0.7, 0.1), DENSITIES, "mergekit"))
    other = knots(given[::-1], lambda blocks: entrywise.ties(blocks, (0.1, 0.7, 1.0), DENSITIES[::-1], "mergekit"))
    assert relative(other.dense(), one.dense()) < FAR


def test_dare_ties_takes_the_place_of_ties() -> None:
    given = sources()

    def combined(blocks: torch.Tensor) -> torch.Tensor:
        mask = masks.at_random(blocks, DENSITIES, [masks.generator(0, "layer", str(i)) for i in range(3)])
        return entrywise.dare_ties(blocks, (1.0, 1.0, 1.0), DENSITIES, mask, "peft")

    u, blocks = aligned(given)
    assert relative(knots(given, combined).dense(), u @ combined(blocks)) < FAR


def test_nothing_at_all() -> None:
    empty = [LowRankDelta(torch.zeros(5, 2, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64))] * 2
    found = knots(empty, lambda blocks: entrywise.ties(blocks, (1.0, 1.0), (0.5, 0.5), "peft"))
    assert found.shape == (5, 3)
    assert not found.dense().any()
