"""Shares, means and their differences, with intervals: what may be said of two arms, and what may not yet.

Two kinds of interval. One for a single look at a moment fixed beforehand: Wilson's for a share, Newcombe's for a
difference of shares, Student's and Welch's for means. And one that holds however often it is looked at, which is what a
page of live figures is for: whoever looks daily and stops at the first difference is wrong far more often than the 5 %
of the first kind. Words are spoken by the second kind alone.

The second kind (Robbins; Howard, Ramdas, McAuliffe, Sekhon 2021): for values in [0, 1] with sum s of n,

    M(p) = B(s + 1/2, n - s + 1/2) / B(1/2, 1/2) / (p^s (1 - p)^(n - s))

starts at 1 and, if p is their mean, is not expected to grow (a martingale for votes; a supermartingale for scores
between, since what a value multiplies it by is convex in the value). So it ever reaches 1/a with a probability of at
most a (Ville): the p with M(p) < 1/a are an interval for all times at once. For two arms the product M1(p1) M2(p2) is
one too, however requests were dealt among them, and the differences of the pairs where it stays below 1/a are the
interval. Nothing here is asymptotic. What it asks is that an arm's answers are all as good in the mean: an arm that
changes under way, or votes that one person casts by the hundred, no formula sees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, inf, lgamma, log, log1p, sqrt
from statistics import NormalDist
from typing import Self

LEVEL = 0.95
Interval = tuple[float, float]

_NO_SPREAD = 1e-12
"""A variance below it is rounding: all values are alike."""
_HALVINGS = 48


@dataclass
class Moments:
    """Count, sum and sum of squares of values, from which one can be taken back."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """A value more; with times=-1 one that was added goes."""
        self.count += times
        self.total += times * value
        self.squares += times * value * value

    @property
    def mean(self) -> float | None:
        """None where there are no values."""
        return self.total / self.count if self.count else None

    @property
    def variance(self) -> float | None:
        """Of the values around their own mean, over count - 1; None below two values."""
        if self.count < 2:
            return None
        return max(0.0, self.squares - self.total * self.total / self.count) / (self.count - 1)

    @property
    def spread(self) -> float | None:
        """The variance of the mean; None below two values, and where all are alike: they tell nothing of it."""
        variance = self.variance
        return None if variance is None or variance < _NO_SPREAD else variance / self.count


def wilson(total: float, count: int, level: float = LEVEL) -> Interval | None:
    """Wilson's interval of a share: those p from which total/count is no farther than their own standard error allows.
    None where nothing was counted."""
    if count == 0:
        return None
    z, share = _normal(level), total / count
    middle, half = share + z * z / (2 * count), z * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return _within_one((middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count))


def newcombe(total: float, count: int, other_total: float, other_count: int, level: float = LEVEL) -> Interval | None:
    """Newcombe's interval (1998, method 10) of the second share minus the first, out of Wilson's of each."""
    one, other = wilson(total, count, level), wilson(other_total, other_count, level)
    if one is None or other is None:
        return None
    first, second = total / count, other_total / other_count
    below = sqrt((second - other[0]) ** 2 + (one[1] - first) ** 2)
    above = sqrt((other[1] - second) ** 2 + (first - one[0]) ** 2)
    return second - first - below, second - first + above


def mean_interval(values: Moments, level: float = LEVEL) -> Interval | None:
    """Student's interval of a mean. None below two values, and where all of them are alike."""
    if values.spread is None or values.mean is None:
        return None
    half = student(values.count - 1, level) * sqrt(values.spread)
    return values.mean - half, values.mean + half


def welch(one: Moments, other: Moments, level: float = LEVEL) -> Interval | None:
    """Welch's interval of the second mean minus the first, for unequal variances (degrees of freedom by Satterthwaite).
    None where an arm has fewer than two values, or nothing but like ones."""
    a, b = one.spread, other.spread
    if a is None or b is None or one.mean is None or other.mean is None:
        return None
    freedom = (a + b) ** 2 / (a * a / (one.count - 1) + b * b / (other.count - 1))
    difference, half = other.mean - one.mean, student(freedom, level) * sqrt(a + b)
    return difference - half, difference + half


def always_valid(total: float, count: int, level: float = LEVEL) -> Interval:
    """An interval of the mean of values in [0, 1] that holds at every look at once (see above)."""
    against, most, share = _Evidence.of(total, count), -log(1 - level), _share(total, count)
    return (
        _edge(lambda p: against.at(p) < most, share, 0.0),
        _edge(lambda p: against.at(p) < most, share, 1.0),
    )


def always_valid_difference(
    total: float, count: int, other_total: float, other_count: int, level: float = LEVEL
) -> Interval:
    """An interval of the second mean minus the first, of values in [0, 1], that holds at every look at once."""
    if count == 0 and other_count == 0:
        return -1.0, 1.0
    one, other, most = _Evidence.of(total, count), _Evidence.of(other_total, other_count), -log(1 - level)

    def possible(difference: float) -> bool:
        """Whether some pair of means that differ so stays below: the least of both together, which is convex."""
        low, high = max(0.0, -difference), min(1.0, 1.0 - difference)
        p = _edge(lambda p: one.slope(p) + other.slope(p + difference) < 0, low, high)
        return one.at(p) + other.at(p + difference) < most

    likeliest = _share(other_total, other_count) - _share(total, count)
    return _edge(possible, likeliest, -1.0), _edge(possible, likeliest, 1.0)


def student(freedom: float, level: float = LEVEL) -> float:
    """How many standard errors to each side hold this much of Student's t of so many degrees of freedom."""
    high = 1.0
    while _beyond(high, freedom) > 1 - level:
        high *= 2
    return _edge(lambda t: _beyond(t, freedom) > 1 - level, 0.0, high)


def _beyond(t: float, freedom: float) -> float:
    """The share of Student's t farther from 0 than t: I_x(freedom/2, 1/2) at x = freedom/(freedom + t²)."""
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = exp(a * log(x) + b * log1p(-x) - _log_beta(a, b)) / a
    return front / _continued(a, b, x)


def _continued(a: float, b: float, x: float) -> float:
    """1 + d1/(1 + d2/(1 + …)), from its far end."""
    value = 1.0
    for m in range(200, 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        value = 1 + even / value
        k = m - 1
        odd = -(a + k) * (a + b + k) * x / ((a + 2 * k) * (a + 2 * k + 1))
        value = 1 + odd / value
    return value


@dataclass(frozen=True)
class _Evidence:
    """log M(p), which is convex in p."""

    constant: float
    ups: float
    downs: float

    @classmethod
    def of(cls, total: float, count: int) -> Self:
        ups, downs = max(0.0, total), max(0.0, count - total)  # sums of scores are rounded
        return cls(_log_beta(ups + 0.5, downs + 0.5) - _log_beta(0.5, 0.5), ups, downs)

    def at(self, p: float) -> float:
        return self.constant - _times_log(self.ups, p) - _times_log(self.downs, 1 - p)

    def slope(self, p: float) -> float:
        return _over(self.downs, 1 - p) - _over(self.ups, p)


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)


def _times_log(factor: float, value: float) -> float:
    if factor <= 0:
        return 0.0
    return factor * log(value) if value > 0 else -inf


def _over(factor: float, value: float) -> float:
    if factor <= 0:
        return 0.0
    return factor / value if value > 0 else inf


def _share(total: float, count: int) -> float:
    """What is likeliest; in the middle where nothing is known."""
    return total / count if count else 0.5


def _edge(inside: Callable[[float], bool], within: float, end: float) -> float:
    """Where `inside`, true at `within`, ends on the way to `end`; `end` itself where it does not."""
    if inside(end):
        return end
    for _ in range(_HALVINGS):
        middle = (within + end) / 2
        if inside(middle):
            within = middle
        else:
            end = middle
    return end


def _normal(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def _within_one(low: float, high: float) -> Interval:
    return max(0.0, low), min(1.0, high)
