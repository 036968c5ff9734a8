"""Drawing from scores without sorting them, and numbers that are a function of a seed and a place."""

import math

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]
Places = NDArray[np.intp]

_GROUP = 64
_DEPTHS = (np.float32(2), np.float32(5))
_DEEPEST, _STEPS = np.float32(32), np.float32(2048)
_BLOCK = 256
_WORD = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number from 0 to 1 (exclusive), of 53 bits: a hash of a seed and of a place in an answer."""
    return (_mixed(_mixed(seed & _WORD) ^ (position & _WORD)) >> 11) * 2.0**-53


def _mixed(word: int) -> int:
    """SplitMix64's step: each bit of the result depends on each of the 64 given (Steele, Lea, Flood 2014)."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def largest(values: Scores, count: int) -> Places:
    """Places of the `count` largest values [n], largest first; of equal ones the first.

    The values are dealt to groups: as many of the groups' maxima as are wanted are a bound that few others reach.
    """
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    groups = len(values) // _GROUP
    few = 2 * count <= groups
    compared = values[: groups * _GROUP].reshape(_GROUP, groups).max(0) if few else values
    floor = np.partition(compared, len(compared) - count)[len(compared) - count] if count else np.inf
    near = np.flatnonzero(values >= floor)
    return near[np.argsort(-values[near], kind="stable")][:count]


def likely(values: Scores, shares: Scores, limit: float) -> Places:
    """Places, in order, of the largest values (0 the highest, -inf some) until their shares reach `limit`; of equal
    ones the first are taken. Most often few are near the highest and have what is wanted."""
    for depth in _DEPTHS:
        near = np.flatnonzero(values > -depth)
        if shares[near].sum(dtype=np.float64) >= limit:
            return near[_until(values[near], shares[near], limit)]
    return _until(values, shares, limit)


def _until(values: Scores, shares: Scores, limit: float) -> Places:
    """The same by steps of equal width, whose shares are summed from the top: only values in the step where the limit
    is reached are sorted."""
    step = (np.maximum(values, -_DEEPEST) * -(_STEPS / _DEEPEST)).astype(np.intp)
    reached = np.cumsum(np.bincount(step, shares.astype(np.float64)))  # cast here: its own casting is slow
    last = min(int(np.searchsorted(reached, limit)), len(reached) - 1)
    edge = np.flatnonzero(step == last)
    edge = edge[np.argsort(-values[edge], kind="stable")]
    before = reached[last - 1] if last else 0.0
    kept = step < last
    kept[edge[: int(np.searchsorted(np.cumsum(shares[edge], dtype=np.float64), limit - before)) + 1]] = True
    return np.flatnonzero(kept)


def total(shares: Scores) -> float:
    """Their sum."""
    return float(_block_sums(shares)[-1])


def place_of(shares: Scores, part: float) -> int:
    """The place whose share holds the `part` (0 to 1) of the sum of all; never one of share 0."""
    sums = _block_sums(shares)
    wanted = part * sums[-1]
    # rounding may bring what is wanted up to the sum itself, and the sum within a block to a little less than its own
    block = min(int(np.searchsorted(sums, wanted, side="right")), int(np.searchsorted(sums, sums[-1])))
    inner = np.cumsum(shares[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    wanted -= sums[block - 1] if block else 0.0
    at = min(int(np.searchsorted(inner, wanted, side="right")), int(np.searchsorted(inner, inner[-1])))
    return block * _BLOCK + at


def _block_sums(shares: Scores) -> NDArray[np.float64]:
    """Sums through the end of each block, within blocks of 32 bits."""
    return np.cumsum(np.add.reduceat(shares, np.arange(0, len(shares), _BLOCK)), dtype=np.float64)


def log_total(scores: Scores) -> float:
    """log Σ exp(scores)."""
    high = scores.max()
    return float(high) + math.log(total(np.exp(scores - high)))
