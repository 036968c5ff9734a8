"""What a row becomes: messages with roles, or plain text. OpenAI's and ShareGPT's ways of writing them, read alike."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from topwork.common.errors import did_you_mean

_CALL = "function_call"  # ShareGPT's role for an assistant turn that is a tool call
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    _CALL: _CALL,
}


@dataclass(frozen=True)
class Message:
    """One turn. `weight` multiplies the weight with which its tokens are learned; None is 1.

    `extra` holds what else the template may read: tool_calls, name, tool_call_id, reasoning_content.
    """

    role: str
    content: str
    weight: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """One row: messages that end with the assistant's (`chat`), or a document (`text`).

    group  what it shares with others that must not be held out apart from it (`data.hold_out_by`)
    notes  what of the row is not learned or was changed on the way, in a few words that are the same for rows of a
           kind: "a user turn at the end is cut"; they are counted and named
    """

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None
    source: str
    kind: Literal["chat", "text"] = "chat"
    text: str | None = None
    group: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    source: str
    reason: str


class RowProblem(Exception):
    """Why the row at hand cannot be used; the readers turn it into a BadRow."""


def text_of(value: object, name: str) -> str:
    """A string, or OpenAI's and LLaMA-Factory's list of text parts as one. Raises RowProblem for anything else."""
    if isinstance(value, list):
        return "".join(_part_text(part, name) for part in value)
    if not isinstance(value, str):
        raise RowProblem(f"{name} is {_kind(value)}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowProblem(f"{name} holds half a surrogate pair at character {error.start}, which is no text") from error
    return value


def _part_text(part: object, name: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RowProblem(f"{name} has a part that is {_kind(part)}, expected {{type: text, text: …}}")
    if part.get("type", "text") != "text":
        raise RowProblem(f"{name} has a part of type {part['type']!r}; only text can be learned")
    text = part.get("text") if part.get("text") is not None else part.get("value")
    return text_of(text, f"a text part of {name}")


def _kind(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def read_messages(items: object, name: str) -> tuple[Message, ...]:
    """A list of {role, content} or {from, value}. Raises RowProblem naming the message by its number, from 1."""
    if not isinstance(items, list) or not items:
        raise RowProblem(f"{name} is {'empty' if items == [] else _kind(items)}, expected a list of messages")
    return tuple(_read_message(item, f"message {number}") for number, item in enumerate(items, 1))


def _read_message(item: object, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowProblem(f"{name} is {_kind(item)}, expected an object with role and content")
    given = item.get("role", item.get("from"))
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise RowProblem(f"{name} has the unknown role {given!r}{did_you_mean(str(given), _ROLES)}")
    content = item.get("content", item.get("value"))
    known = ("role", "from", "content", "value", "weight", "loss_weight", "tool_calls", "function_call")
    extra = {key: value for key, value in item.items() if key not in known and value is not None}
    calls = [content] if role == _CALL else item.get("tool_calls") or ([item[_CALL]] if item.get(_CALL) else None)
    if calls:
        extra["tool_calls"] = read_calls(calls, name)
        content = "" if role == _CALL or content is None else content
        role = "assistant"
    return Message(role, text_of(content, f"the content of {name}"), _weight(item, name), extra)


def _weight(item: Mapping[str, Any], name: str) -> float | None:
    value = item.get("weight") if item.get("weight") is not None else item.get("loss_weight")
    if value is None:
        return None
    if not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise RowProblem(f"the weight of {name} is {value!r}, expected a number from 0 on")
    return float(value)


def read_calls(calls: object, name: str) -> list[dict[str, Any]]:
    """Tool calls as templates want them: {type: function, function: {name, arguments}}, arguments as an object.

    OpenAI writes arguments as a string of JSON; a template that applies `tojson` would quote that a second time.
    """
    calls = _parsed(calls)
    found: list[dict[str, Any]] = []
    for given in calls if isinstance(calls, list) else [calls]:
        call = _parsed(given)
        if isinstance(call, list):
            found += read_calls(call, name)
            continue
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowProblem(f"a tool call of {name} is not {{name, arguments}}: {str(given)[:60]!r}")
        inner = {"name": function["name"], "arguments": _parsed(function.get("arguments", {}))}
        outer = {key: value for key, value in call.items() if key == "id" and value is not None}
        found.append({**outer, "type": "function", "function": inner})
    return found


def read_tools(value: object) -> list[dict[str, Any]] | None:
    """Tool definitions, a list or a string of JSON, as {type: function, function: {name, …}}; None for none."""
    tools = _parsed(value)
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowProblem(f"tools is {_kind(tools)}, expected a list of tool definitions")
    return [dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]


def _parsed(value: object) -> Any:
    """A string that is a JSON object or list, as that; everything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def checked(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """The messages, with `system` in front where there is none. Raises RowProblem where nothing could be learned."""
    for number, message in enumerate(messages, 1):
        empty = not message.content.strip() and not message.extra.get("tool_calls")
        if empty and message.role in ("user", "assistant"):
            what = "no answer: " if message.role == "assistant" and number == len(messages) else ""
            raise RowProblem(f"{what}message {number} ({message.role}) is empty")
    if messages[-1].role != "assistant":
        raise RowProblem(f"no answer: the last message is the {messages[-1].role}'s, expected the assistant's")
    if system and not any(message.role == "system" for message in messages):
        return (Message("system", system), *messages)
    return tuple(messages)
