"""Pairs, judged answers and prompts as examples: what an objective that compares answers or rewards them is given."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from topwork.data.chat.template import ChatTemplate, Encoded
from topwork.data.conversations import BadRow, Conversation, Message
from topwork.data.examples import Example
from topwork.data.preferences.reading import Judged, Pair, Prompt

Side = Encoded | str
"""A sequence, or why there is none."""


@dataclass(frozen=True)
class Coded:
    """The examples of a pair or a judged answer; notes as `Encoded.notes`."""

    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()


def encode_pairs(template: ChatTemplate, pairs: Sequence[Pair]) -> list[Coded | BadRow]:
    """Of each pair its two examples, the chosen answer first, in a group of their own; or why it has none.

    Column `chosen` is 1 in the one and -1 in the other, and where all pairs have a margin, column `margin` is it. Only
    the answers are learned, and what stands before them is what generation is prompted with.
    """
    answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    talks = [_talk(pair, answer) for pair, answer in zip((pair for pair in pairs for _ in "cr"), answers)]
    sides = _encoded(template, talks)
    margins = bool(pairs) and all(pair.margin is not None for pair in pairs)
    return [
        _two(pair, number, sides[2 * number : 2 * number + 2], {"margin": pair.margin or 0.0} if margins else {})
        for number, pair in enumerate(pairs)
    ]


def _two(pair: Pair, number: int, sides: Sequence[Side], columns: dict[str, float]) -> Coded | BadRow:
    wrong = next(
        (f"{name}: {side}" for name, side in zip(("chosen", "rejected"), sides) if isinstance(side, str)), None
    )
    encoded = [side for side in sides if isinstance(side, Encoded)]
    if wrong is None and encoded[0].tokens == encoded[1].tokens:
        wrong = "the chosen and the rejected answer become the same tokens"
    if wrong is not None:
        return BadRow(pair.source, wrong)
    group = f"{pair.source} ({number})"
    signs = (1.0, -1.0)
    return Coded(
        tuple(_example(one, pair.source, {"chosen": sign, **columns}, group) for one, sign in zip(encoded, signs)),
        tuple(dict.fromkeys(note for one in encoded for note in one.notes)),
    )


def encode_judged(template: ChatTemplate, rows: Sequence[Judged]) -> list[Coded | BadRow]:
    """Of each judged answer its example, or why it has none; what is learned of it is as in `encode_pairs`.

    Column `desirable` is 1 in good answers and -1 in bad ones.
    """
    sides = _encoded(template, [_talk(row, row.completion) for row in rows])
    return [
        BadRow(row.source, side) if isinstance(side, str)
        else Coded((_example(side, row.source, {"desirable": 1.0 if row.label else -1.0}),), side.notes)
        for row, side in zip(rows, sides)
    ]  # fmt: skip


def prompt_ids(template: ChatTemplate, row: Prompt) -> list[int]:
    """What generation is prompted with. Raises DataError for messages that the template rejects."""
    return template.prompt_ids(row.messages, row.tools)


def _talk(row: Pair | Judged, answer: Sequence[Message]) -> Conversation:
    """The talk of which this answer alone is learned."""
    before = [replace(message, weight=0.0) if message.role == "assistant" else message for message in row.prompt]
    return Conversation((*before, *answer), row.tools, row.source)


def _encoded(template: ChatTemplate, talks: Sequence[Conversation]) -> list[Side]:
    sequences, bad = template.encode_all([replace(talk, source=str(number)) for number, talk in enumerate(talks)])
    reasons = {int(row.source): row.reason for row in bad}
    several = "the chat template leaves out parts of an answer's turns later on, so they are no one sequence"
    return [reasons.get(number) or (found[0] if len(found) == 1 else several) for number, found in enumerate(sequences)]


def _example(one: Encoded, source: str, columns: dict[str, float], group: str | None = None) -> Example:
    tokens, weights = np.asarray(one.tokens, dtype=np.int32), np.asarray(one.weights, dtype=np.float32)
    filled = {name: np.full(len(tokens), value, dtype=np.float32) for name, value in columns.items()}
    return Example(tokens, weights, source, filled, group)
