"""TIES, DARE, DELLA, Breadcrumbs and KnOTS from their definitions: an entry at a time, in Python's own numbers.

Each takes matrices as lists of rows, one for each source; each gives a list of rows. Masks are given, True for what is
kept, and chances where they are needed.
"""

import math
from collections.abc import Sequence

import numpy as np

Rows = Sequence[Sequence[float]]


def ties(sources: Sequence[Rows], weights: Sequence[float], density: Sequence[float], convention: str) -> Rows:
    return _elected([trimmed(rows, share) for rows, share in zip(sources, density)], weights, convention, True)


def magnitude_prune(sources: Sequence[Rows], weights: Sequence[float], density: Sequence[float]) -> Rows:
    return _added([trimmed(rows, share) for rows, share in zip(sources, density)], weights)


def dare(
    sources: Sequence[Rows], weights: Sequence[float], density: Sequence[float], masks: Sequence[Rows], convention: str
) -> Rows:
    return _added(_dropped(sources, density, masks, convention), weights)


def dare_ties(
    sources: Sequence[Rows], weights: Sequence[float], density: Sequence[float], masks: Sequence[Rows], convention: str
) -> Rows:
    return _elected(_dropped(sources, density, masks, convention), weights, convention, convention == "peft")


def della(
    sources: Sequence[Rows], weights: Sequence[float], density: Sequence[float], masks: Sequence[Rows],
    convention: str, epsilon: float,
) -> Rows:  # fmt: skip
    chances = [chance(rows, share, epsilon) for rows, share in zip(sources, density)]
    return _elected(_dropped(sources, chances, masks, convention), weights, convention, True)


def breadcrumbs(sources: Sequence[Rows], weights: Sequence[float], density: Sequence[float], gamma: float) -> Rows:
    parts = []
    for rows, share in zip(sources, density):
        order = _largest_first(rows)
        kept = max(1, int(share * len(order)))
        first = min(int(gamma * len(order)), len(order) - kept)
        parts.append(_only(rows, order[first : first + kept]))
    return _added(parts, weights)


def trimmed(rows: Rows, share: float) -> Rows:
    order = _largest_first(rows)
    return _only(rows, order[: max(1, int(share * len(order)))])


def chance(rows: Rows, share: float, epsilon: float) -> Rows:
    """DELLA's: the smallest of a row of n has rank 0, the largest n - 1."""
    result = []
    for row in rows:
        order = sorted(range(len(row)), key=lambda column: (abs(row[column]), column))
        steps = {column: rank / (len(row) - 1) for rank, column in enumerate(order)} if len(row) > 1 else {0: 0.5}
        wide = epsilon if share < 1 else 0
        result.append([share - wide + 2 * wide * steps[column] for column in range(len(row))])
    return result


def knots_ties(sources: Sequence[Rows], weights: Sequence[float], density: Sequence[float], convention: str) -> Rows:
    """By the SVD of the dense matrices side by side."""
    dense = [np.array(rows, dtype=np.float64) for rows in sources]
    u, sigma, v = np.linalg.svd(np.concatenate(dense, axis=1), full_matrices=False)
    rank = max(1, int((sigma > 1e-9 * sigma[0]).sum()))
    blocks = np.split(sigma[:rank, None] * v[:rank], len(dense), axis=1)
    merged = ties([block.tolist() for block in blocks], weights, density, convention)
    return (u[:, :rank] @ np.array(merged)).tolist()


def _largest_first(rows: Rows) -> list[tuple[int, int]]:
    places = [(i, j) for i, row in enumerate(rows) for j in range(len(row))]
    return sorted(places, key=lambda place: (-abs(rows[place[0]][place[1]]), place))


def _only(rows: Rows, places: Sequence[tuple[int, int]]) -> Rows:
    kept = set(places)
    return [[value if (i, j) in kept else 0.0 for j, value in enumerate(row)] for i, row in enumerate(rows)]


def _dropped(sources: Sequence[Rows], chances: Sequence, masks: Sequence[Rows], convention: str) -> list[Rows]:
    parts = []
    for rows, chances_here, mask in zip(sources, chances, masks):
        kept = [[value if keep else 0.0 for value, keep in zip(*pair)] for pair in zip(rows, mask)]
        before, after = (math.fsum(abs(value) for row in side for value in row) for side in (rows, kept))
        for i, row in enumerate(kept):
            for j in range(len(row)):
                if convention == "mergekit":
                    row[j] *= before / after if after else 1
                else:
                    row[j] /= chances_here if isinstance(chances_here, float) else chances_here[i][j]
        parts.append(kept)
    return parts


def _added(parts: Sequence[Rows], weights: Sequence[float]) -> Rows:
    height, width = len(parts[0]), len(parts[0][0])
    return [
        [math.fsum(weight * part[i][j] for part, weight in zip(parts, weights)) for j in range(width)]
        for i in range(height)
    ]


def _elected(parts: Sequence[Rows], weights: Sequence[float], convention: str, average: bool) -> Rows:
    result = []
    for i in range(len(parts[0])):
        row = []
        for j in range(len(parts[0][0])):
            here = [(part[i][j], weight) for part, weight in zip(parts, weights) if weight != 0]
            if convention == "mergekit":
                sign = 1 if math.fsum(value * weight for value, weight in here) >= 0 else -1
                agreeing = [(value, weight) for value, weight in here if value * weight * sign > 0]
                shares = math.fsum(abs(weight) for _, weight in agreeing)
            else:
                sign = 1 if math.fsum(value for value, _ in here) >= 0 else -1
                agreeing = [(value, weight) for value, weight in here if value * sign > 0]
                shares = len(agreeing)
            total = math.fsum(value * weight for value, weight in agreeing)
            row.append(total / shares if average and agreeing else total)
        result.append(row)
    return result
