"""How an answer differs from its reference, word by word."""

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
COMPARED_WORDS = 1500
"""Longer texts are shown without marks: the comparison is quadratic."""
LEAST_LIKENESS = 0.4
"""Below this ratio the answer is another text, and marks would be noise."""


@dataclass(frozen=True)
class Piece:
    """`extra` stands in the answer and not in the reference, `missing` the other way round."""

    kind: Literal["same", "extra", "missing"]
    text: str


def differences(reference: str, answer: str) -> list[Piece]:
    """The answer in pieces; without the missing ones they join to the answer."""
    left, right = _WORDS.findall(reference), _WORDS.findall(answer)
    if not right or max(len(left), len(right)) > COMPARED_WORDS:
        return [Piece("same", answer)]
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    if matcher.ratio() < LEAST_LIKENESS:
        return [Piece("same", answer)]
    pieces: list[Piece] = []
    for tag, left_start, left_stop, right_start, right_stop in matcher.get_opcodes():
        if tag == "equal":
            pieces.append(Piece("same", "".join(right[right_start:right_stop])))
            continue
        if left_stop > left_start:
            pieces.append(Piece("missing", "".join(left[left_start:left_stop])))
        if right_stop > right_start:
            pieces.append(Piece("extra", "".join(right[right_start:right_stop])))
    return pieces
