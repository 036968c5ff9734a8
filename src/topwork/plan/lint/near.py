"""Texts that are nearly the same: MinHash over word shingles, in bands, each candidate verified (Broder 1997; Leskovec,
Rajaraman and Ullman, Mining of Massive Datasets, ch. 3).

Two texts' Jaccard similarity is |A ∩ B| / |A ∪ B| of their sets of shingles (runs of three words, case aside). The
smallest of a random hash over a set is the same for both with just that probability, so 80 hashes in 16 bands of 5 make
a pair of similarity 0.8 a candidate with probability 1 - (1 - 0.8^5)^16 = 0.998, one of 0.5 with 0.4. All constants are
fixed: the same texts give the same pairs.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

SIMILAR = 0.8
"""The Jaccard similarity from which two texts are nearly the same."""
WORDS, BANDS, PER_BAND = 3, 16, 5
FEWEST_WORDS = 8
"""Shorter texts are no matter of likeness: one word more or less changes what they say."""
_BOILERPLATE = 0.5
"""What stands in so many of all texts (an instruction that all share) tells them apart in nothing."""
_BACK = 4
"""Of a bucket, each text is compared with the first and with so many before it: all pairs of ten thousand alike are too
many, and one is enough to tell a text."""
_ROWS_AT_ONCE = 5000
_SIGN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(f"[{_SIGN}]|[^\\W{_SIGN}]+")
"""A word; of Chinese, Japanese and Korean, which write none apart, a sign."""
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, eq=False)
class Shingles:
    """Sets of hashed shingles, end to end: those of text i are values[bounds[i] : bounds[i + 1]], sorted, each once."""

    values: np.ndarray
    bounds: np.ndarray

    def of(self, number: int) -> np.ndarray:
        """Those of one text."""
        return np.asarray(self.values[self.bounds[number] : self.bounds[number + 1]])


def shingles_of(texts: Iterable[str]) -> Shingles:
    """The shingles of each text, less those that half of all texts share; none of a short one."""
    known: dict[str, int] = {}
    values, sizes = bytearray(), [np.zeros(0, np.int64)]
    coming = iter(texts)
    while some := list(islice(coming, _ROWS_AT_ONCE)):
        found, counts = _hashed(some, known)
        values += found.data
        sizes.append(counts)
    return _without_boilerplate(np.frombuffer(values, np.uint64), np.concatenate(sizes))


def _hashed(texts: Sequence[str], known: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """(the texts' shingles end to end, how many each has); `known` numbers the words as they first come."""
    ids: list[int] = []
    lengths = []
    for text in texts:
        words = _WORD.findall(text.lower()) if text else []
        words = words if len(words) >= FEWEST_WORDS else []
        ids += [known.setdefault(word, len(known) + 1) for word in words]
        lengths.append(len(words))
    if not ids:
        return np.zeros(0, np.uint64), np.zeros(len(texts), np.int64)
    flat, owner = np.array(ids, np.uint64), np.repeat(np.arange(len(texts)), lengths)
    mixed = flat[: 1 - WORDS]
    for shift in range(1, WORDS):
        mixed = _mixed(mixed * _MIX + flat[shift : len(flat) - WORDS + 1 + shift])
    inside = owner[: 1 - WORDS] == owner[WORDS - 1 :]
    mixed, owner = mixed[inside], owner[: 1 - WORDS][inside]
    order = np.lexsort((mixed, owner))
    mixed, owner = mixed[order], owner[order]
    once = np.concatenate(([True], (mixed[1:] != mixed[:-1]) | (owner[1:] != owner[:-1])))
    return mixed[once], np.bincount(owner[once], minlength=len(texts))


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finish: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def _without_boilerplate(values: np.ndarray, sizes: np.ndarray) -> Shingles:
    texts = int((sizes > 0).sum())
    if texts >= 20:
        often = int(_BOILERPLATE * texts)
        ordered = np.sort(values)
        shared = np.unique(ordered[often:][ordered[often:] == ordered[: len(ordered) - often]])
        del ordered
        if len(shared):
            kept = ~np.isin(values, shared)
            owner = np.repeat(np.arange(len(sizes)), sizes)[kept]
            values, sizes = values[kept], np.bincount(owner, minlength=len(sizes))
    return Shingles(values, np.concatenate(([0], np.cumsum(sizes))).astype(np.int64))


def near_pairs(shingles: Shingles, split: int = 0) -> list[tuple[int, int]]:
    """(earlier, later) of texts of which the Jaccard similarity is at least SIMILAR, in the order of the later.

    split  where it is given, only pairs of which the earlier is before it and the later is not
    """
    numbers = np.flatnonzero(np.diff(shingles.bounds) > 0)
    if not len(numbers):
        return []
    signatures = _signatures(shingles, numbers)
    pairs = _candidates(signatures, numbers, split)
    if not len(pairs):
        return []
    at = np.searchsorted(numbers, pairs)
    likely = np.concatenate([
        (signatures[part[:, 0]] == signatures[part[:, 1]]).mean(axis=1) > SIMILAR - 0.2
        for part in np.array_split(at, len(at) // 50_000 + 1)
    ])  # fmt: skip
    kept = [(int(a), int(b)) for a, b in pairs[likely] if _jaccard(shingles.of(a), shingles.of(b)) >= SIMILAR]
    return sorted(kept, key=lambda pair: (pair[1], pair[0]))


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def _signatures(shingles: Shingles, numbers: np.ndarray) -> np.ndarray:
    """[texts, BANDS * PER_BAND] uint32: of each hash the smallest value over a text's shingles."""
    seeds = _mixed(np.arange(1, BANDS * PER_BAND + 1, dtype=np.uint64) * _MIX)
    made = np.empty((len(numbers), len(seeds)), np.uint32)
    for start in range(0, len(numbers), _ROWS_AT_ONCE):
        rows = numbers[start : start + _ROWS_AT_ONCE]
        first, last = shingles.bounds[rows[0]], shingles.bounds[rows[-1] + 1]
        values, heads = shingles.values[first:last], shingles.bounds[rows] - first
        for column, seed in enumerate(seeds):
            hashed = ((values ^ seed) * (seed | np.uint64(1))) >> np.uint64(32)
            made[start : start + len(rows), column] = np.minimum.reduceat(hashed.astype(np.uint32), heads)
    return made


def _candidates(signatures: np.ndarray, numbers: np.ndarray, split: int) -> np.ndarray:
    """[pairs, 2] numbers of texts that share a band: each with the first of its bucket and with
    some before it."""
    found = []
    for band in range(BANDS):
        part = signatures[:, band * PER_BAND : (band + 1) * PER_BAND].astype(np.uint64)
        key = part[:, 0]
        for column in range(1, PER_BAND):
            key = _mixed(key * _MIX + part[:, column])
        order = np.argsort(key, kind="stable")
        new = np.concatenate(([True], key[order][1:] != key[order][:-1]))
        heads = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
        others = np.flatnonzero(~new)
        partners = [heads[others], *(np.maximum(others - back, heads[others]) for back in range(1, _BACK + 1))]
        pairs = np.concatenate([np.stack([order[each], order[others]], axis=1) for each in partners])
        found.append(np.unique(numbers[pairs], axis=0))
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs[(pairs[:, 0] < split) & (pairs[:, 1] >= split)] if split else pairs
