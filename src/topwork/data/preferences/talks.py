"""Talks as preference data have them: lists of messages, messages alone, OpenAI's {messages: …}, text, JSON as text."""

import json
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from topwork.data.config import DataConfig
from topwork.data.conversations import RowProblem
from topwork.data.meaning.fields import plain, said_of

SPEAKS = ("assistant", "gpt", "chatgpt", "bot", "model")
"""How the assistant is called."""
_UNREAD = "unread"  # what data.message_keys calls a key that says nothing
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def is_talk(value: object) -> TypeGuard[list[Any]]:
    """Whether it is a list of messages."""
    return isinstance(value, list) and bool(value) and role_of(value[0]) != ""


def role_of(turn: object) -> str:
    """Without capital letters; empty where it is none."""
    return plain(turn.get("role", turn.get("from", ""))) if isinstance(turn, Mapping) else ""


def as_talk(value: Any, name: str) -> Any:
    """A message alone as a list of it, OpenAI's {messages: …} as the list; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    if value.get("tools"):
        raise RowProblem(f"{name} has tools beside its messages; put them into a column of their own, tools")
    return [value] if role_of(value) else value.get("messages", value)


def transcript(value: object) -> list[dict[str, str]] | None:
    """The turns of a text that begins with `Human:` or `Assistant:` and goes on so; None where it does not."""
    before, *parts = _TURN.split(value) if isinstance(value, str) else [""]
    if before.strip() or not parts:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]


def respelled(fields: Mapping[str, Any], config: DataConfig) -> Mapping[str, Any]:
    """A row whose talks are spelled as ours, by data.message_keys and data.roles; talks as JSON text become talks."""
    if not (
        config.message_keys or config.roles or any(_opens(value) or _is_capital(value) for value in fields.values())
    ):
        return fields
    return {name: _respelled(_opened(value, config), config) for name, value in fields.items()}


_KEYS = ("role", "from", "content", "value", "messages", "tool_calls")


def _ours(key: str, config: DataConfig) -> str:
    """A message's key as we spell it."""
    named = said_of(key, config.message_keys)
    return named if named is not None else plain(key) if plain(key) in _KEYS else key


def _is_capital(value: object) -> bool:
    """Whether it is a talk whose keys are ours but for capital letters."""
    turn = value[0] if isinstance(value, list) and value else value
    return isinstance(turn, Mapping) and any(key not in _KEYS and plain(key) in _KEYS for key in turn)


def _opens(value: object) -> bool:
    return isinstance(value, str) and value.lstrip()[:1] in ("[", "{")


def _opened(value: Any, config: DataConfig) -> Any:
    """A text that is JSON of messages as these; anything else as it is."""
    if not _opens(value):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    turns = found.get("messages", found) if isinstance(found, dict) else found
    turns = turns if isinstance(turns, list) else [turns]
    return found if turns and all(_is_message(turn, config) for turn in turns) else value


def _is_message(turn: object, config: DataConfig) -> bool:
    """Whether it says who speaks and what is said; an answer may be JSON that is no message."""
    keys = {_ours(key, config) for key in turn} if isinstance(turn, dict) else set()
    return bool({"role", "from"} & keys) and bool({"content", "value", "tool_calls"} & keys)


def _respelled(value: Any, config: DataConfig) -> Any:
    if isinstance(value, list):
        return [_respelled(each, config) if isinstance(each, Mapping) else each for each in value]
    if not isinstance(value, Mapping):
        return value
    named = {_ours(key, config): each for key, each in value.items()}
    turn = {
        key: _respelled(each, config) if key == "messages" else each for key, each in named.items() if key != _UNREAD
    }
    role = "role" if "role" in turn else "from"
    return {**turn, role: said_of(str(turn[role]), config.roles) or turn[role]} if role in turn else turn
