"""Proof that what a row holds stands in what the chat template made of it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from topwork.data.chat.thinking import extra_thought, has_thinking, parts
from topwork.data.conversations import Message

THINKING, TEXT, BESIDE = "thinking", "text", "text beside a tool call"


def missing(message: Message, text: str, thinking: bool = True) -> list[str]:
    """What of an assistant's message does not stand in the text, by kind: its thinking, its text, the text beside a
    tool call, `the tool call NAME`. White space around, and the ways in which JSON writes letters, do not matter.

    thinking  False where it may be left out, as templates do with earlier turns
    """
    if not message.extra and not has_thinking(message.content):
        return [] if _spelling(message.content.strip(), text) is not None else [TEXT]
    gone: list[str] = []
    pieces = sorted(_pieces(message, thinking), key=lambda piece: (-len(piece[1]), piece[0] == THINKING))
    for kind, piece in pieces:
        spelling = _spelling(piece, text)
        if spelling is None:
            gone.append(kind)
        else:  # what stands once proves one piece
            text = text.replace(spelling, "\0", 1)
    return list(dict.fromkeys(gone))


def stands_in(content: str, text: str, start: int = 0) -> int:
    """Where in the text the content ends, looked for from `start` on first; -1 where it is not there."""
    content = content.strip()
    at = text.find(content, start)
    if at >= 0:
        return at + len(content)
    return start if _spelling(content, text) is not None else -1


def kinds(message: Message) -> set[str]:
    """All that `missing` could find of a message."""
    return {kind for kind, _ in _pieces(message, True)}


def _pieces(message: Message, thinking: bool) -> Iterator[tuple[str, str]]:
    calls = message.extra.get("tool_calls") or ()
    thoughts, rest = parts(message.content)
    if thinking:
        yield from ((THINKING, text) for text in map(str.strip, [*thoughts, *extra_thought(message.extra)]) if text)
    beside = BESIDE if calls else TEXT
    yield from ((beside, text) for text in map(str.strip, rest) if text)
    for call in calls:
        function = call["function"]
        kind = f"the tool call {function['name']}"
        yield kind, str(function["name"])
        yield from ((kind, text) for text in _leaves(_parsed(function.get("arguments"))) if text.strip())


def _parsed(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _leaves(value: Any) -> Iterator[str]:
    """The texts that arguments are made of: names, texts, numbers."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield str(key)
            yield from _leaves(each)
    elif isinstance(value, Sequence):
        for each in value:
            yield from _leaves(each)
    elif value is not None and not isinstance(value, bool):
        yield json.dumps(value)


def _spelling(piece: str, text: str) -> str | None:
    """How the text spells the piece: as it is, or as JSON does, once or twice over; None where it does not."""
    if piece in text:
        return piece
    for ascii_only in (False, True):
        once = json.dumps(piece, ensure_ascii=ascii_only)[1:-1]
        for spelled in (once, json.dumps(once, ensure_ascii=ascii_only)[1:-1]):
            if spelled in text:
                return spelled
    return None
