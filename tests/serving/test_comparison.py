"""What is said of two arms: against published values, against definitions, and under looks without end."""

from statistics import mean, variance

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.intervals import ever_left, student_within, wealth, wilson_by_search
from topwork.serving.comparison import (
    Moments,
    always_valid,
    always_valid_difference,
    mean_interval,
    newcombe,
    student,
    welch,
    wilson,
)

SLEEP = (  # Student's own table (1908): hours of sleep that two drugs brought
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
)


def moments(values: list[float]) -> Moments:
    found = Moments()
    for value in values:
        found.add(value)
    return found


@pytest.mark.parametrize(
    ("total", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_as_published(total: int, count: int, low: float, high: float) -> None:
    """Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 3."""
    assert wilson(total, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [
        ((48, 80), (56, 70), 0.0524, 0.3339),
        ((3, 10), (9, 10), 0.1705, 0.8090),
        ((2, 7), (6, 7), 0.0582, 0.8062),
        ((0, 29), (5, 56), -0.0381, 0.1926),
    ],
)
def test_differences_of_shares_as_published(one: tuple, other: tuple, low: float, high: float) -> None:
    """Newcombe 1998, Interval estimation for the difference between independent proportions, table II, method 10."""
    assert newcombe(*one, *other) == pytest.approx((low, high), abs=5e-5)
    assert newcombe(*other, *one) == pytest.approx((-high, -low), abs=5e-5)


def test_difference_of_means_as_published() -> None:
    """R's t.test(extra ~ group, data = sleep): 17.776 degrees of freedom."""
    assert welch(*map(moments, SLEEP)) == pytest.approx((-0.2054832, 3.3654832), abs=5e-8)


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (30, 2.0423)])
def test_students_t_as_tabled(freedom: int, t: float) -> None:
    assert student(freedom) == pytest.approx(t, abs=5e-5)


@pytest.mark.parametrize("freedom", [1.5, 3, 17.776, 400])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_students_t_by_its_density(freedom: float, level: float) -> None:
    assert student_within(student(freedom, level), freedom) == pytest.approx(level, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.floats(0, 1))
def test_a_share_by_the_test_that_it_inverts(count: int, part: float) -> None:
    total = round(part * count)
    assert wilson(total, count) == pytest.approx(wilson_by_search(total, count, 1.959964), abs=1e-5)


@given(st.lists(st.floats(0, 1000), min_size=2, max_size=30), st.floats(0, 1000))
def test_moments_add_up_and_values_can_be_taken_back(values: list[float], other: float) -> None:
    found = moments([*values, other])
    found.add(other, -1)
    assert found.count == len(values)
    assert found.mean == pytest.approx(mean(values), abs=1e-6)
    assert found.variance == pytest.approx(variance(values), abs=1e-4)


def test_nothing_is_told_of_what_tells_nothing() -> None:
    assert wilson(0, 0) is None
    assert newcombe(0, 0, 1, 2) is None
    assert mean_interval(moments([0.7])) is None
    alike = moments([0.7] * 9)
    assert mean_interval(alike) is None, "nine like values are no proof that the tenth is like them"
    assert welch(alike, moments([0.1, 0.4])) is None
    assert always_valid(0, 0) == (0, 1)
    assert always_valid_difference(0, 0, 0, 0) == (-1, 1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_the_interval_for_all_looks_is_where_no_gambler_has_grown_rich(values: list[float]) -> None:
    low, high = always_valid(sum(values), len(values))
    assert low <= mean(values) <= high
    for end, outside in ((low, low - 1e-4), (high, high + 1e-4)):
        if 1e-3 < end < 1 - 1e-3:
            assert wealth(values, end) == pytest.approx(20, rel=1e-4)
            assert wealth(values, outside) > 20


@pytest.mark.parametrize("p", [0.03, 0.5, 0.9])
def test_whoever_looks_after_every_vote_is_rarely_wrong(p: float) -> None:
    """Exactly, by the distribution of all ways that 60 votes may come."""

    def outside(interval: tuple[float, float]) -> bool:
        return not interval[0] <= p <= interval[1]

    always = ever_left(p, 60, lambda heads, tosses: outside(always_valid(heads, tosses)))
    once = ever_left(p, 60, lambda heads, tosses: outside(wilson(heads, tosses) or (0, 1)))
    assert always <= 0.05
    assert once > 0.15, "the interval for one look is not for many: else the other were not needed"


@pytest.mark.parametrize(
    ("one", "other"), [((3, 12), (9, 11)), ((0, 5), (5, 5)), ((10, 20), (0, 0)), ((2.5, 9), (7, 8))]
)
def test_the_difference_for_all_looks_is_where_two_gamblers_together_have_not(one: tuple, other: tuple) -> None:
    p = (np.arange(400) + 0.5) / 400

    def wealths(total: float, count: int) -> np.ndarray:
        whole = int(total)
        values = [1.0] * whole + [total - whole] * (total > whole) + [0.0] * (count - whole - (total > whole))
        return np.array([wealth(values, each) for each in p])

    together = wealths(*one)[:, None] * wealths(*other)[None, :]
    differences = (p[None, :] - p[:, None])[together < 20]
    assert always_valid_difference(*one, *other) == pytest.approx((differences.min(), differences.max()), abs=8e-3)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.floats(0, 1), st.floats(0, 1))
def test_a_difference_the_other_way_round_is_the_same(one: int, other: int, a: float, b: float) -> None:
    low, high = always_valid_difference(a * one, one, b * other, other)
    assert -1 <= low <= high <= 1
    assert always_valid_difference(b * other, other, a * one, one) == pytest.approx((-high, -low), abs=1e-6)
    if one and other:
        assert low <= b - a <= high


def test_a_difference_that_is_there_is_told_in_the_end() -> None:
    assert always_valid_difference(50, 100, 60, 100)[0] < 0
    assert always_valid_difference(500, 1000, 600, 1000)[0] < 0 < always_valid_difference(1000, 2000, 1200, 2000)[0]
