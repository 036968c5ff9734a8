"""Messages whose content is a list of parts that are more than text: thinking, calls of tools, and their results, as
Anthropic and Mistral write them."""

from collections.abc import Mapping
from typing import Any

from topwork.data.meaning.values import RowProblem, text_of

_THINKS, _CALLS, _RESULTS = ("thinking", "reasoning"), ("tool_use",), ("tool_result",)


def unfolded(item: Any, name: str) -> list[Any]:
    """The messages that a message with such parts is: results of tools, each a message of its own, and what it says,
    its thinking and its calls under keys of their own. Raises RowProblem for text that follows a call."""
    parts = item.get("content") if isinstance(item, Mapping) else None
    if not isinstance(parts, list) or not any(_kind(part) in (*_THINKS, *_CALLS, *_RESULTS) for part in parts):
        return [item]
    kinds = [_kind(part) for part in parts]
    called = next((number for number, kind in enumerate(kinds) if kind in _CALLS), len(kinds))
    if any(kind not in _CALLS for kind in kinds[called:]):
        raise RowProblem(f"{name} has a part of type {kinds[-1]!r} after a tool call, where a turn ends")
    results = [
        {"role": "tool", "content": part.get("content"), "tool_call_id": part.get("tool_use_id")}
        for part, kind in zip(parts, kinds)
        if kind in _RESULTS
    ]
    thoughts = [_thought(part, name) for part, kind in zip(parts, kinds) if kind in _THINKS]
    calls = [
        {"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}
        for part, kind in zip(parts, kinds)
        if kind in _CALLS
    ]
    said = [part for part, kind in zip(parts, kinds) if kind not in (*_THINKS, *_CALLS, *_RESULTS)]
    more: dict[str, Any] = {"thinking": "\n\n".join(thoughts)} if thoughts else {}
    more |= {"tool_calls": calls} if calls else {}
    return [*results, *([{**item, "content": said, **more}] if said or more else [])]


def _kind(part: object) -> object:
    return part.get("type") if isinstance(part, Mapping) else None


def _thought(part: Mapping[str, Any], name: str) -> str:
    """The text of a part that holds thinking."""
    value = next((part[key] for key in (*_THINKS, "text") if part.get(key) is not None), None)
    return text_of(value, f"the thinking of {name}")
