"""What stands for several messages: a content of parts that are more than text (thinking, calls of tools and their
results, as Anthropic and Mistral write them), and an object that is a question and its answer."""

from collections.abc import Collection, Mapping
from typing import Any

from topwork.data.meaning.fields import first_called, plain
from topwork.data.meaning.values import RowProblem, text_of

_THINKS, _CALLS, _RESULTS = ("thinking", "reasoning"), ("tool_use",), ("tool_result",)


def unfolded(item: Any, name: str, mapped: Collection[str] = ()) -> list[Any]:
    """The messages that an object of a talk is. Of parts: results of tools, each a message of its own, and what it
    says, its thinking and its calls under keys of their own. Raises RowProblem for text that follows a call.

    mapped  keys of which the recipe says what they are
    """
    keys = exchange_keys(item)
    if keys is not None and not {*keys} & {*mapped}:
        return _exchange(item, *keys)
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


EXCHANGES = (
    ("input", "output"), ("human", "assistant"), ("user", "assistant"), ("human", "gpt"), ("question", "answer"),
    ("query", "response"), ("prompt", "response"), ("prompt", "completion"), ("instruction", "output"),
)  # fmt: skip
"""What files call a question and its answer that are one object of a talk."""
_SPEAKS = ("role", "from", "speaker", "author", "sender")


def exchange_keys(item: object) -> tuple[str, str] | None:
    """Under which keys an object of a talk holds a question and its answer; None where it is no such."""
    if not isinstance(item, Mapping) or any(plain(key) in _SPEAKS for key in item):
        return None
    for pair in EXCHANGES:
        asked, answered = (first_called((key,), item) for key in pair)
        if asked and answered and isinstance(item[asked], str) and isinstance(item[answered], str):
            return asked, answered
    return None


def _exchange(item: Mapping[str, Any], asked: str, answered: str) -> list[dict[str, Any]]:
    system = item.get("system")
    more = {key: value for key, value in item.items() if key not in (asked, answered, "system")}
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    return [
        *first,
        {"role": "user", "content": item[asked]},
        {"role": "assistant", "content": item[answered], **more},
    ]


def _kind(part: object) -> object:
    return part.get("type") if isinstance(part, Mapping) else None


def _thought(part: Mapping[str, Any], name: str) -> str:
    """The text of a part that holds thinking."""
    value = next((part[key] for key in (*_THINKS, "text") if part.get(key) is not None), None)
    return text_of(value, f"the thinking of {name}")
