"""Keys of a message that say whether it is learned, under the names that other tools gave them."""

import re
from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from typing import Any

from topwork.common.errors import did_you_mean
from topwork.common.yaml_text import in_yaml
from topwork.data.meaning.values import RowProblem


class Mark(Enum):
    """What a key says of its message."""

    WEIGHT = "a number from 0 on, by which what is learned is multiplied"
    LEARNED = "true or false, or a number from 0 to 1"
    MASKED = "true where it is not learned"
    DOUBTFUL = "it sounds as if it said so, and is not known"


_KNOWN = {
    "weight": Mark.WEIGHT,
    "loss_weight": Mark.WEIGHT,
    "loss": Mark.LEARNED,
    "train": Mark.LEARNED,
    "training": Mark.LEARNED,
    "trainable": Mark.LEARNED,
    "learn": Mark.LEARNED,
    "masked": Mark.MASKED,
    "mask": Mark.MASKED,
}
_LEFT_OUT = ("mask", "ignore", "skip", "exclude")
_SOUNDS = ("loss", "train", "weight", "learn", "supervise", *_LEFT_OUT)
THINKING_KEYS = ("reasoning_content", "thinking", "reasoning", "thought", "thoughts")
EXTRA_KEYS = ("name", "tool_call_id", "tool_name", "tool_calls", "function_call", *THINKING_KEYS)
"""Keys of a message that templates are known to read."""
MESSAGE_KEYS = ("role", "content", *EXTRA_KEYS, *_KNOWN, "unread")
"""What a key of the file may be said to be; `unread` is nothing."""


_THOUGHT = re.compile(r"reason|think|thought|rationale|scratchpad|monologue|(?:\A|_)(?:cot|analysis)(?:_|\Z)")


def refuse_thought(key: str, value: object, name: str, keys: Mapping[str, str]) -> None:
    """Raises RowProblem for what an answer may hold of thinking under a key that nothing reads: it would be lost.

    keys  what data.message_keys says now
    """
    if key in EXTRA_KEYS or not _THOUGHT.search(str(key).lower()):
        return
    if isinstance(value, str) and len(value.split()) > 1:
        how = f"set data.message_keys: {in_yaml({**keys, key: 'thinking'})} to learn it"
    elif isinstance(value, list | Mapping) and value:
        how = "write it as text under reasoning_content"
    else:
        return
    raise RowProblem(
        f"{name} has the key {key!r}, which sounds as if it held the answer's thinking, and is not known; {how}, or "
        f"data.message_keys: {in_yaml({**keys, key: 'unread'})} to leave it out"
    )


@lru_cache(maxsize=4096)
def mark_of(key: str) -> Mark | None:
    """What a key says of what is learned; None where it is about something else."""
    name = str(key).lower()
    found = _KNOWN.get(name)
    return found if found or not any(sound in name for sound in _SOUNDS) else Mark.DOUBTFUL


def weight_of(marks: Mapping[str, Any], name: str, keys: Mapping[str, str]) -> float:
    """The weight that a message's marks, at least one, give it.

    Raises RowProblem, which calls the message `name`, for values that mean nothing and for marks that contradict each
    other.
    """
    said = {key: _read(key, value, name, keys) for key, value in marks.items()}
    numbers = {key: value for key, value in said.items() if not isinstance(value, bool)}
    sure = {key: value for key, value in said.items() if isinstance(value, bool)}
    if len(set(numbers.values())) > 1 or len(set(sure.values())) > 1 or _disagree(numbers, sure):
        told = ", ".join(f"{key}: {marks[key]!r}" for key in said)
        raise RowProblem(f"{name} says both that it is learned and that it is not, or how much in two ways ({told})")
    if numbers:
        return float(next(iter(numbers.values())))
    return float(all(sure.values()))


def _disagree(numbers: Mapping[str, Any], sure: Mapping[str, bool]) -> bool:
    return any(bool(number) != learned for number in numbers.values() for learned in sure.values())


def _read(key: str, value: object, name: str, keys: Mapping[str, str]) -> bool | float:
    """Whether it is learned, or with which weight."""
    mark = mark_of(key)
    if mark is Mark.DOUBTFUL:
        raise RowProblem(_doubtful(key, value, name, keys))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if mark is Mark.WEIGHT:
        if not number or not 0 <= float(value) < float("inf"):  # type: ignore[arg-type]
            raise RowProblem(f"the {key} of {name} is {value!r}, expected a number from 0 on")
        return float(value)  # type: ignore[arg-type]
    if isinstance(value, bool) or (number and value in (0, 1)):
        return bool(value) is not (mark is Mark.MASKED)
    if mark is Mark.LEARNED and number and 0 <= float(value) <= 1:  # type: ignore[arg-type]
        return float(value)  # type: ignore[arg-type]
    raise RowProblem(f"the key {key} of {name} is {value!r}, expected {mark.value if mark else 'nothing'}")


def _doubtful(key: str, value: object, name: str, keys: Mapping[str, str]) -> str:
    says = isinstance(value, bool | int | float) and 0 <= value <= 1
    masked = isinstance(value, bool) and any(sound in key.lower() for sound in _LEFT_OUT)
    example = "masked" if masked else "train" if says else "unread"
    near = did_you_mean(key, _KNOWN, 2)
    return (
        f"{name} has the key {key!r}, which sounds as if it said whether the message is learned, and is not known"
        f"{near or ';'} known are {', '.join(_KNOWN)}; data.message_keys says what it is, for example "
        f"data.message_keys: {in_yaml({**keys, key: example})} (unread: it says nothing)"
    )
