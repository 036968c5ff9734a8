"""What of a conversation is learned, and what of it is cut, left out or only read: told in notes, never in silence."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from topwork.data.config import DataConfig
from topwork.data.conversations import Message
from topwork.data.meaning.marks import EXTRA_KEYS
from topwork.data.meaning.values import RowProblem, opens

Turns = tuple[Message, ...]


def usable(messages: Sequence[Message], config: DataConfig) -> tuple[Turns, tuple[str, ...]]:
    """The messages as they are put to the template, with `data.system` in front where there is no other, and notes on
    what was changed. Raises RowProblem where nothing could be learned."""
    turns = tuple(messages)
    if not config.merge_turns and _is_plain(turns):
        return _with_system(turns, config.system), ()
    notes = dict.fromkeys(unread_keys(messages))
    _refuse_broken_calls(turns)
    if any(turn.role == "system" and not turn.content.strip() for turn in turns):
        turns = tuple(turn for turn in turns if turn.role != "system" or turn.content.strip())
        notes["an empty system message is left out"] = None
    turns = _with_system(turns, config.system)
    if config.merge_turns:
        merged = merged_turns(turns)
        if len(merged) != len(turns):
            notes["turns of one role in a row are made one"] = None
        turns = merged
    turns = _cut(turns, notes)
    turns = _weighed(turns, config, notes)
    return turns, tuple(notes)


def _refuse_broken_calls(turns: Turns) -> None:
    """Raises RowProblem for arguments that begin as JSON and are none: they would be learned so. A client's history may
    have them, from a model whose answer was cut."""
    for number, turn in enumerate(turns, 1):
        for call in turn.extra.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if isinstance(arguments, str) and opens(arguments):
                raise RowProblem(
                    f"the arguments of the tool call {name} of message {number} are no JSON: {arguments!r:.62}"
                )


def _with_system(turns: Turns, system: str | None) -> Turns:
    """With the recipe's system message in front where there is no other."""
    if not system or any(turn.role == "system" for turn in turns):
        return turns
    return (Message("system", system), *turns)


def _is_plain(turns: Turns) -> bool:
    """Whether there is nothing to be changed or told: most rows are so, and this is quick."""
    if turns[-1].role != "assistant" or turns[turns[0].role == "system"].role != "user":
        return False
    for turn in turns:
        if turn.weight is not None or turn.extra or not turn.content or turn.content.isspace():
            return False
    return True


def unread_keys(messages: Sequence[Message]) -> list[str]:
    """A note for each key of a message that means nothing here; templates are given them all the same."""
    keys = {key for message in messages for key in message.extra if key not in EXTRA_KEYS}
    return [f"message key {key!r} is not read, unless by the template" for key in sorted(map(str, keys))]


def _says_nothing(turn: Message) -> bool:
    """Whether there is no text and no call. Thinking alone is no answer."""
    return not turn.extra.get("tool_calls") and not turn.content.strip()


def _cut(turns: Turns, notes: dict[str, None]) -> Turns:
    """Through the last answer that says something: what follows asks for nothing that the row holds."""
    last = len(turns)
    while last and (turns[last - 1].role != "assistant" or _says_nothing(turns[last - 1])):
        last -= 1
    if not last:
        raise RowProblem(_no_answer(turns))
    for turn in turns[last:]:
        if turn.role == "assistant":
            notes["an empty answer at the end is cut"] = None
        elif turns[-1].role != "assistant":
            notes[f"a {turn.role} turn at the end is cut"] = None
    return turns[:last]


def _no_answer(turns: Turns) -> str:
    empty = next((number for number, turn in enumerate(turns, 1) if turn.role == "assistant"), 0)
    if empty:
        return f"no answer: message {empty} (assistant) is empty"
    if not turns:
        return "no answer: there is no message but an empty system message"
    return f"no answer: the last message is the {turns[-1].role}'s, expected the assistant's"


def _weighed(turns: Turns, config: DataConfig, notes: dict[str, None]) -> Turns:
    """The answers that nothing asks for, and those that say nothing, with the weight 0.

    An assistant who speaks first is context: in use an application puts the greeting there, many templates cannot
    prompt for it, and what is learned of a row must not hang on the template or on `data.system`. Where a system
    message asks for all that the row holds, that is learned, and so is an opening whose own weight says so.
    """
    if config.train_on == "all":
        why: list[str | None] = [_EMPTY_TURN if _lost(turn) else None for turn in turns]
    else:
        why = _unlearned(turns)
    if all(reason for turn, reason in zip(turns, why) if turn.role == "assistant"):
        why = [None if reason is OPENING and turns[0].role == "system" else reason for reason in why]
        if all(reason for turn, reason in zip(turns, why) if turn.role == "assistant"):
            raise RowProblem(_nothing_learned(turns))
    for turn, reason in zip(turns, why):
        if reason and turn.weight != 0 and config.train_on != "last_answer":
            notes[reason] = None
        if turn.weight and turn.role != "assistant" and config.train_on != "all":
            notes[f"a {turn.role} turn has a weight, and data.train_on learns answers alone"] = None
    return tuple(replace(turn, weight=0.0) if reason else turn for turn, reason in zip(turns, why))


OPENING = "the opening answer is context: nothing asks for it"
_EMPTY = "an empty answer is not learned"
_EMPTY_TURN = "an empty turn is not learned"
_UNASKED = "the answer to an empty user turn is not learned"


def _lost(turn: Message) -> bool:
    return turn.role in ("user", "assistant") and _says_nothing(turn)


def _unlearned(turns: Turns) -> list[str | None]:
    """Why an answer is not learned; None for one that is, and for other turns."""
    found: list[str | None] = []
    asked = False
    for number, turn in enumerate(turns):
        reason = None
        if turn.role in ("user", "tool"):
            asked = True
        elif turn.role == "assistant":
            if _says_nothing(turn):
                reason = _EMPTY
            elif number and turns[number - 1].role == "user" and _says_nothing(turns[number - 1]):
                reason = _UNASKED
            elif not asked and not (turn.weight and turns[0].role == "system"):
                reason = OPENING
        found.append(reason)
    return found


def _nothing_learned(turns: Turns) -> str:
    empty = next((number for number, turn in enumerate(turns, 1) if turn.role == "user" and _says_nothing(turn)), 0)
    if empty:
        return f"message {empty} (user) is empty"
    return "nothing asks for the answer: there is no user's turn before it, and no system message"


def merged_turns(turns: Sequence[Message]) -> Turns:
    """One turn of several of one role in a row, an empty line between their contents.

    A tool's results stay apart, since each belongs to its own call, and so does text after a call. Raises RowProblem
    for turns of different weights, and for keys of which only one value can stand.
    """
    found: list[Message] = []
    for number, turn in enumerate(turns, 1):
        before = found[-1] if found else None
        apart = before is None or before.role != turn.role or turn.role == "tool"
        if before is None or apart or (before.extra.get("tool_calls") and turn.content.strip()):
            found.append(turn)
        else:
            found[-1] = _merged(before, turn, number)
    return tuple(found)


def _merged(first: Message, second: Message, number: int) -> Message:
    weights = [1.0 if turn.weight is None else turn.weight for turn in (first, second)]
    if weights[0] != weights[1] and not _says_nothing(first) and not _says_nothing(second):
        raise RowProblem(
            f"data.merge_turns makes message {number} one with the turn before it, and their weights are not the same "
            f"({weights[0]:g} and {weights[1]:g})"
        )
    parts = [turn.content for turn in (first, second) if turn.content.strip()]
    weight = second.weight if _says_nothing(first) else first.weight
    extra = dict(first.extra)
    for key, value in second.extra.items():
        extra[key] = _both(extra[key], value, key, number) if key in extra else value
    return Message(first.role, "\n\n".join(parts), weight, extra)


def _both(first: object, second: object, key: str, number: int) -> object:
    if isinstance(first, list) and isinstance(second, list):
        return [*first, *second]
    if first == second or key not in EXTRA_KEYS:
        return first
    if isinstance(first, str) and isinstance(second, str) and key != "name":
        return f"{first}\n\n{second}"
    raise RowProblem(f"data.merge_turns makes message {number} one with the turn before it, and their {key} differ")


def prompt_group(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str:
    """A short hash of what the last answer is an answer to: the same for the same prompt."""
    asked = messages[: _last(messages)]
    said = [part for turn in asked for part in (turn.role, turn.content)]
    called = [turn.extra["tool_calls"] for turn in asked if "tool_calls" in turn.extra]
    more = json.dumps([called, tools], ensure_ascii=False, sort_keys=True, default=str) if called or tools else ""
    return hashed("\x1f".join([*said, more]))


def hashed(text: str) -> str:
    """A short name that is the same for the same text, on every machine."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _last(messages: Sequence[Message]) -> int:
    """The number of messages before the last answer."""
    return max((number for number, turn in enumerate(messages) if turn.role == "assistant"), default=len(messages))
