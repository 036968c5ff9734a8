"""Which rows are held out, which say the same, and how often an epoch sees each: decided by numbers of rows alone."""

import hashlib
import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from topwork.common.errors import DataError
from topwork.data.conversations import Conversation, Message
from topwork.data.summary import Note


@dataclass(frozen=True)
class HeldOut:
    """Numbers of the rows that are held out, and what is to be told of how they were chosen."""

    rows: frozenset[int]
    notes: tuple[Note, ...] = ()


def units(conversations: Sequence[Conversation], by: str) -> list[Hashable]:
    """For each row what it must not be parted from by holding out (`data.hold_out_by`)."""
    if by == "row":
        return list(range(len(conversations)))
    own = prompt_key if by == "prompt" else (lambda _: None)
    keys = (row.group if row.group is not None else own(row) for row in conversations)
    return [("row", number) if key is None else key for number, key in enumerate(keys)]


def prompt_key(row: Conversation) -> str:
    """The same for rows with the same prompt: the messages before the last answer, and the tools. A document is one by
    itself, and the same as its copies."""
    if row.kind == "text":
        told: object = ["text", row.text]
    else:
        last = max((n for n, message in enumerate(row.messages) if message.role == "assistant"), default=0)
        told = [[_said(message) for message in row.messages[:last]], row.tools]
    return hashlib.blake2b(json.dumps(told, default=str).encode(), digest_size=16).hexdigest()


def _said(message: Message) -> list[object]:
    return [message.role, message.content, message.extra]


def hold_out(units: Sequence[Hashable], usable: Sequence[bool], fraction: float, seed: int, by: str) -> HeldOut:
    """A share of the usable rows, drawn by `seed`, whole units alone; at least one row is held out and one is kept.

    The units are permuted in the order of their first rows, usable or not, so that a longer `max_length` or another
    template holds out the same ones. A unit is taken where this brings the count nearer to the share; where all are
    too large for it, the smallest. Where all rows have one prompt, rows are held out each by itself. Raises DataError
    where they all have one value of the column `by`.
    """
    count = sum(usable)
    wanted = min(max(1, round(count * fraction)), count - 1) if fraction > 0 else 0
    if wanted <= 0:
        return HeldOut(frozenset())
    members: dict[Hashable, list[int]] = {}
    sizes: dict[Hashable, int] = {}
    for number, unit in enumerate(units):
        members.setdefault(unit, []).append(number)
        sizes[unit] = sizes.get(unit, 0) + bool(usable[number])
    if max(sizes.values()) == count:
        if by != "prompt":
            raise DataError(
                f"data.hold_out_by is {by}, and all rows have one value there, so none can be held out; set it to "
                "prompt or row, name data.eval, or set data.eval_fraction: 0"
            )
        rows = hold_out(range(len(units)), usable, fraction, seed, "row").rows
        text = "all rows have the same prompt, so they are held out each by itself, and validation sees that prompt too"
        return HeldOut(rows, (Note(text, warning=True),))
    drawn = [list(members)[at] for at in np.random.default_rng(seed).permutation(len(members))]
    held = _taken(drawn, sizes, wanted)
    found = frozenset(number for unit in held for number in members[unit] if usable[number])
    total = sum(sizes[unit] for unit in held)
    if total == wanted:
        return HeldOut(found)
    what = "one prompt" if by == "prompt" else f"one value of {by}"
    text = f"{total:,} rows are held out instead of {wanted:,}, because rows with {what} stay together"
    return HeldOut(found, (Note(text, warning=total > 2 * wanted),))


def _taken(drawn: Iterable[Hashable], sizes: dict[Hashable, int], wanted: int) -> list[Hashable]:
    """Units in the order drawn, each of which brings the count nearer to `wanted`; the smallest where none does."""
    held, total = [], 0
    for unit in drawn:
        if sizes[unit] and abs(total + sizes[unit] - wanted) < abs(total - wanted):
            held.append(unit)
            total += sizes[unit]
        if total >= wanted:
            break
    return held or [min((unit for unit in sizes if sizes[unit]), key=lambda unit: sizes[unit])]


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
