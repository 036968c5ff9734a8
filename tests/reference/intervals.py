"""Intervals by their definitions, slowly: what `topwork.serving.comparison` computes by formula."""

from collections.abc import Callable
from math import exp, lgamma, pi, sqrt

import numpy as np


def wilson_by_search(total: float, count: int, z: float) -> tuple[float, float]:
    """Those p of a fine grid that a score test does not reject."""
    p = np.linspace(0, 1, 200_001)
    kept = p[np.abs(total / count - p) <= z * np.sqrt(p * (1 - p) / count) + 1e-12]
    return float(kept[0]), float(kept[-1])


def student_within(t: float, freedom: float) -> float:
    """The share of Student's t within t of 0, by Simpson's rule over its density."""
    x = np.linspace(-t, t, 20_001)
    scale = exp(lgamma((freedom + 1) / 2) - lgamma(freedom / 2)) / sqrt(freedom * pi)
    y = scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    return float((x[1] - x[0]) / 3 * (y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum()))


def wealth(values: list[float], p: float) -> float:
    """What a gambler has who splits a coin among all means q, by the arcsine law, and bets each part on every value in
    turn, at odds that are fair if p is their mean: 1 at first, and not expected to grow where p is right."""
    q = np.sin((np.arange(20_000) + 0.5) / 20_000 * pi / 2) ** 2
    parts = np.zeros_like(q)
    for value in values:
        parts += value * np.log(q / p) + (1 - value) * np.log((1 - q) / (1 - p))
    return float(np.exp(parts).mean())


def ever_left(p: float, looks: int, leaves: Callable[[int, int], bool]) -> float:
    """The probability that, within so many looks at ever more tosses of p, the truth is ever outside of an interval.
    Exact: the distribution of heads, toss by toss, where it never was.

    leaves(heads, tosses): whether it is, there.
    """
    inside = np.array([1.0])
    for tosses in range(1, looks + 1):
        inside = np.append(inside * (1 - p), 0.0) + np.append(0.0, inside * p)
        inside[[leaves(heads, tosses) for heads in range(tosses + 1)]] = 0.0
    return 1 - float(inside.sum())
