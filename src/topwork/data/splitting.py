"""Which rows are held out, which say the same, and how often an epoch sees each: decided by numbers of rows alone."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from topwork.common.errors import DataError
from topwork.data.config import SourceConfig, called
from topwork.data.conversations import Conversation
from topwork.data.meaning.usable import hashed, prompt_group
from topwork.data.summary import Note

_BLOCK = 1 << 18  # keys that are looked up at a time


@dataclass(frozen=True)
class HeldOut:
    """Numbers of the rows that are held out, and what is to be told of how they were chosen."""

    rows: frozenset[int]
    notes: tuple[Note, ...] = ()


def units(conversations: Sequence[Conversation], by: str) -> list[Hashable]:
    """For each row what it must not be parted from by holding out (`data.hold_out_by`)."""
    if by == "row":
        return list(range(len(conversations)))
    keys = (unit_of(row, by) for row in conversations)
    return [("row", number) if key is None else key for number, key in enumerate(keys)]


def unit_of(row: Conversation, by: str) -> Hashable | None:
    """What a row must not be parted from, where it is not held out by itself."""
    return prompt_key(row) if row.group is None and by == "prompt" else row.group


def no_such_column(by: str) -> DataError:
    """Of `data.hold_out_by`."""
    return DataError(
        f"data.hold_out_by is {by!r}, and no row has a value in a column of this name; name one that is there, or "
        "say prompt (rows with the same prompt stay together) or row"
    )


def prompt_key(row: Conversation) -> str:
    """The same for rows with the same prompt: the messages before the last answer, and the tools. A document is one by
    itself, and the same as its copies."""
    return hashed(row.text or "") if row.kind == "text" else prompt_group(row.messages, row.tools)


def hold_out(units: Sequence[Hashable], usable: Sequence[bool], fraction: float, seed: int, by: str) -> HeldOut:
    """A share of the usable rows, drawn by `seed`, whole units alone; at least one row is held out and one is kept.

    The units are permuted in the order of their first rows, usable or not, so that a longer `max_length` or another
    template holds out the same ones. A unit is taken where this brings the count nearer to the share; where all are
    too large for it, the smallest. Where all rows have one prompt, rows are held out each by itself. Raises DataError
    where they all have one value of the column `by`.
    """
    numbers: dict[Hashable, int] = {}
    of_rows = np.array([numbers.setdefault(unit, len(numbers)) for unit in units], dtype=np.int64)
    held, notes = held_rows(of_rows, np.array(usable, dtype=bool), fraction, seed, by)
    return HeldOut(frozenset(np.flatnonzero(held).tolist()), notes)


def held_rows(
    units: np.ndarray, usable: np.ndarray, fraction: float, seed: int, by: str
) -> tuple[np.ndarray, tuple[Note, ...]]:
    """As `hold_out`: whether each row is held out.

    units   [rows] the number of each row's unit, counted in the order of their first rows
    usable  [rows] bool
    """
    count = int(usable.sum())
    wanted = min(max(1, round(count * fraction)), count - 1) if fraction > 0 else 0
    if wanted <= 0:
        return np.zeros(len(units), dtype=bool), ()
    alone = int(units.max()) + 1 == len(units)
    sizes = usable.astype(np.int8) if alone else np.bincount(units[usable], minlength=int(units.max()) + 1)
    if sizes.max() == count:
        if by != "prompt":
            raise DataError(
                f"data.hold_out_by is {by}, and all rows have one value there, so none can be held out; set it to "
                "prompt or row, name data.eval, or set data.eval_fraction: 0"
            )
        each, _ = held_rows(np.arange(len(units)), usable, fraction, seed, "row")
        text = "all rows have the same prompt, so they are held out each by itself, and validation sees that prompt too"
        return each, (Note(text, warning=True),)
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[_taken(permuted(len(sizes), seed), sizes, wanted)] = True
    total = int(sizes[chosen].sum())
    held = chosen[units] & usable
    if total == wanted:
        return held, ()
    what = "one prompt" if by == "prompt" else f"one value of {by}"
    text = f"{total:,} rows are held out instead of {wanted:,}, because rows with {what} stay together"
    return held, (Note(text, warning=total > 2 * wanted),)


def _taken(drawn: np.ndarray, sizes: np.ndarray, wanted: int) -> list[int]:
    """Units in the order drawn, each of which brings the count nearer to `wanted`; the smallest where none does."""
    held, total = list[int](), 0
    for unit in drawn:
        size = int(sizes[unit])
        if size and abs(total + size - wanted) < abs(total - wanted):
            held.append(int(unit))
            total += size
        if total >= wanted:
            break
    return held or [int(np.where(sizes > 0, sizes, sizes.max() + 1).argmin())]


def permuted(count: int, seed: int | list[int]) -> np.ndarray:
    """`np.random.default_rng(seed).permutation(count)` in half of its memory, where four bytes hold the numbers."""
    numbers = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    np.random.default_rng(seed).shuffle(numbers)
    return numbers


def unit_numbers(keys: np.ndarray) -> np.ndarray:
    """For each row the number of its key [rows] int64, counted in the order of their first rows; [rows] int32 or
    int64."""
    first = is_first(keys)
    numbers = np.cumsum(first, dtype=_whole(len(keys)))
    numbers -= 1
    if first.all():
        return numbers
    rows = _among(keys, np.unique(keys[~first]))
    _, earliest, inverse = np.unique(keys[rows], return_index=True, return_inverse=True)
    numbers[rows] = numbers[rows[earliest]][inverse]
    return numbers


def is_first(keys: np.ndarray) -> np.ndarray:
    """Whether no earlier row has the row's key [rows] int64; [rows] bool. Needs little memory beside the keys where few
    stand more than once: of each key the half is looked at first."""
    halves = keys.astype(np.uint32)
    halves.sort()
    several = np.unique(halves[1:][halves[1:] == halves[:-1]])
    del halves
    rows = _among(keys, several)
    first = np.ones(len(keys), dtype=bool)
    first[rows] = False
    first[rows[np.unique(keys[rows], return_index=True)[1]]] = True
    return first


def _among(keys: np.ndarray, few: np.ndarray) -> np.ndarray:
    """The numbers of the rows whose key, in the type of `few`, is one of these, which are sorted."""
    if not len(few):
        return np.empty(0, dtype=np.int64)
    found = []
    for start in range(0, len(keys), _BLOCK):
        own = keys[start : start + _BLOCK].astype(few.dtype)
        found.append(start + np.flatnonzero(few[np.minimum(np.searchsorted(few, own), len(few) - 1)] == own))
    return np.concatenate(found)


def _whole(count: int) -> type[np.signedinteger]:
    return np.int32 if count < 2**31 else np.int64


def repeats(keys: Sequence[Hashable | None]) -> list[int]:
    """Numbers of the rows whose key an earlier row has; None is never the same."""
    seen: set[Hashable] = set()
    found = []
    for number, key in enumerate(keys):
        if key is None:
            continue
        if key in seen:
            found.append(number)
        seen.add(key)
    return found


def times(count: int, weight: float, seed: int, source: int) -> np.ndarray:
    """How often an epoch sees each of a source's rows, [count] int: the whole part of `weight`, and once more for a
    share of them as large as the rest, which the seed and the source's number draw."""
    found = np.full(count, int(weight))
    more = round((weight - int(weight)) * count)
    if weight < 1:
        more = max(1, more)
    if count and more:
        found[np.random.default_rng([seed, source]).permutation(count)[:more]] += 1
    return found


def weight_note(source: SourceConfig, seen: int, rows: int) -> Note:
    """What a source's weight comes to."""
    return Note(f"{called(source.path)} has the weight {source.weight:g}: an epoch sees {seen:,} rows, from {rows:,}")
