"""Cosine, norms and shares out of factors are those of the dense matrices."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merging.adapters_of import CASES, changes, write_one
from reference.families import tiny_base
from topwork.merging.deltas import DenseDelta, LowRankDelta
from topwork.merging.likeness import Likeness, compared, likeness, overall


def random(rank: int, seed: int, rows: int = 12, columns: int = 9) -> LowRankDelta:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(rows, rank, dtype=torch.float64, generator=generator)
    return LowRankDelta(b, torch.randn(rank, columns, dtype=torch.float64, generator=generator))


def share(values: Tensor, of: Tensor, rank: int) -> float:
    """Of ‖values‖², what the projection on the other's first `rank` left singular vectors keeps."""
    u = torch.linalg.svd(of)[0][:, :rank]
    return float((u @ u.t() @ values).square().sum() / values.square().sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_likeness_of_factors(first_rank: int, second_rank: int, seed: int) -> None:
    first, second = random(first_rank, seed), random(second_rank, seed + 1)
    one, other = first.dense(), second.dense()
    padded = LowRankDelta(torch.cat([second.b, second.b * 0], 1), torch.cat([second.a, second.a]))
    found = compared(first, padded)
    assert found.norms == pytest.approx((float(one.norm()), float(other.norm())))
    assert found.cosine == pytest.approx(float((one * other).sum() / one.norm() / other.norm()), abs=1e-12)
    assert found.columns == pytest.approx((share(one, other, second_rank), share(other, one, first_rank)), abs=1e-9)
    turned = (share(one.t(), other.t(), second_rank), share(other.t(), one.t(), first_rank))
    assert found.rows == pytest.approx(turned, abs=1e-9)


def test_what_has_the_same_columns_lies_in_the_other() -> None:
    first = random(2, 0)
    second = LowRankDelta(torch.cat([first.b, random(1, 5).b], 1), random(3, 7).a)
    found = compared(first, second)
    assert found.columns[0] == pytest.approx(1)
    assert found.rows[0] is not None
    assert found.rows[0] < 0.9
    assert compared(first, LowRankDelta(-first.b, first.a)).cosine == pytest.approx(-1)


def test_dense_changes() -> None:
    first, second = random(2, 0), DenseDelta(random(9, 3).dense())
    found = compared(first, second)
    assert found.columns[0] is None
    assert found.columns[1] == pytest.approx(share(second.dense(), first.dense(), 2))


def test_absent_and_zero_changes() -> None:
    first = random(2, 0)
    for other in (None, LowRankDelta(first.b * 0, first.a)):
        assert compared(first, other) == Likeness((first.norm(), 0.0), None, (None, None), (None, None))


def test_whole_modules_are_compared_by_parameter(tmp_path: Path) -> None:
    base = tiny_base()
    options = (CASES["saved"], CASES["head"])
    found = [changes(write_one(tmp_path / f"s{at}", base, each, at), base) for at, each in enumerate(options)]
    alike = likeness(*found, base_norm=lambda name: float(base.module.get_parameter(name).norm()))
    values = [source.of_parameter("lm_head", "weight") for source in found]
    assert values[0] is not None
    assert values[1] is not None
    cosine = torch.nn.functional.cosine_similarity(values[0].flatten(), values[1].flatten(), dim=0)
    assert alike["lm_head.weight"].cosine == pytest.approx(float(cosine), abs=1e-6)
    assert alike["lm_head.weight"].columns[1] is None
    assert alike["model.norm.weight"].norms[1] == 0
    assert alike["model.norm.weight"].base == pytest.approx(
        float(base.module.get_parameter("model.norm.weight").norm())
    )


def test_overall_is_that_of_one_long_vector() -> None:
    pairs = [(random(2, seed), random(3, seed + 50)) for seed in range(4)]
    alone = random(2, 90)
    found = overall([*(compared(a, b, 2.0) for a, b in pairs), compared(alone, None, 2.0)])
    one = torch.cat([a.dense().flatten() for a, _ in pairs] + [alone.dense().flatten()])
    other = torch.cat([b.dense().flatten() for _, b in pairs])
    assert found.norms == pytest.approx((float(one.norm()), float(other.norm())))
    assert found.cosine == pytest.approx(float(one[: len(other)] @ other / one.norm() / other.norm()))
    kept = sum(share(a.dense(), b.dense(), 3) * a.norm() ** 2 for a, b in pairs)
    assert found.columns[0] == pytest.approx(kept / float(one.square().sum()))
    assert found.base == pytest.approx(math.sqrt(5) * 2)
