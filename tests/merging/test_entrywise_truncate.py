"""Factors of a dense ΔW: the best ones, and what they leave out, told as it is."""

import pytest
import torch
from torch import Tensor

from reference.measure import relative
from topwork.merging.combine import truncate
from topwork.merging.combine.truncate import truncated

ROUNDED = 2.0**-52


@pytest.fixture(params=["exact", "randomized"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "randomized":
        monkeypatch.setattr(truncate, "EXACT", 0)
    return request.param


def slowly_falling(out: int, inner: int) -> Tensor:
    """Low-rank ΔW with a sparse rest over it, as a trim leaves it: its singular values end nowhere."""
    torch.manual_seed(1)
    low = torch.randn(out, 4, dtype=torch.float64) @ torch.randn(4, inner, dtype=torch.float64)
    return torch.where(low.abs() > 2, low, 0)


@pytest.mark.parametrize("shape", [(120, 200), (200, 120)])
@pytest.mark.parametrize("r", [1, 5, 12])
def test_no_matrix_of_that_rank_is_nearer(way: str, shape: tuple[int, int], r: int) -> None:
    values = slowly_falling(*shape)
    b, a, discarded = truncated(values, r)
    assert b.shape == (shape[0], r)
    assert a.shape == (r, shape[1])
    energy, best = float(values.square().sum()), float(torch.linalg.svdvals(values)[r:].square().sum())
    assert discarded == pytest.approx(float((values - b @ a).square().sum()), rel=1e-12)
    assert best * (1 - 1e-12) <= discarded <= best + (1e-4 * energy if way == "randomized" else 1e-12 * energy)


def test_what_has_that_rank_comes_back(way: str) -> None:
    torch.manual_seed(0)
    values = torch.randn(150, 6, dtype=torch.float64) @ torch.randn(6, 90, dtype=torch.float64)
    b, a, discarded = truncated(values, 6)
    assert relative(b @ a, values) < 200 * ROUNDED
    assert discarded < (200 * ROUNDED) ** 2 * float(values.square().sum())


def test_the_full_rank_and_more(way: str) -> None:
    torch.manual_seed(0)
    values = torch.randn(9, 13, dtype=torch.float64)
    for r in (9, 20):
        b, a, discarded = truncated(values, r)
        assert b.shape == (9, r)
        assert a.shape == (r, 13)
        assert relative(b @ a, values) < 100 * ROUNDED
        assert discarded < 1e-24


def test_factors_share_the_size(way: str) -> None:
    b, a, _ = truncated(slowly_falling(100, 140), 5)
    assert relative(b.norm(dim=0), a.norm(dim=1)) < 1e-12
    assert relative(b.t() @ b, a @ a.t(), least=float(b.norm() ** 2)) < 1e-9  # both are Σ


def test_the_same_again_and_turned_round(way: str) -> None:
    values = slowly_falling(100, 140)
    b, a, discarded = truncated(values, 5)
    again = truncated(values.clone(), 5)
    assert torch.equal(b, again[0])
    assert torch.equal(a, again[1])
    assert discarded == again[2]
    assert (b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all()


def test_nothing_gives_nothing(way: str) -> None:
    b, a, discarded = truncated(torch.zeros(40, 30), 4)
    assert discarded == 0
    assert not b.any()
    assert not a.any()
    assert b.dtype == torch.float64
