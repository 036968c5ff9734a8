"""Tool calls and their results as a chat template takes them: the form of arguments and ids, and one call a turn where
it writes no more."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from topwork.data.chat.calls import with_short_ids
from topwork.data.chat.rendering import Renderer, TemplateRejects
from topwork.data.conversations import Message, RowProblem

_NAME, _KEY = "topworkprobetool", "topworkprobekey"
_IDS = ("topwork01", "topwork02")
_LONG = "call_0123456789abcdef"
_AS_JSON = re.compile(r"\{\s*\"" + _KEY + r"\":\s*1\s*\}")
SPLIT = "several calls of one turn are put one after another, each with its result"


@dataclass(frozen=True)
class CallNeeds:
    """What a template wants of calls.

    as_text    arguments as JSON text, not as an object
    ids        every call and result has an id
    short_ids  of nine letters and digits (mistral)
    one        a turn has one call at most (llama 3.1)
    """

    as_text: bool = False
    ids: bool = False
    short_ids: bool = False
    one: bool = False


def call_needs(renderer: Renderer) -> CallNeeds:
    """Found by asking the template."""
    as_text = _proof(renderer, json.dumps({_KEY: 1})) > _proof(renderer, {_KEY: 1})
    arguments: Any = json.dumps({_KEY: 1}) if as_text else {_KEY: 1}
    if not _rendered(renderer, arguments, _IDS[:1]):
        return CallNeeds()
    one = not _rendered(renderer, arguments, _IDS)
    ids, short = not _rendered(renderer, arguments, (None,)), not _rendered(renderer, arguments, (_LONG,))
    return CallNeeds(as_text, ids or short, short, one)


def _proof(renderer: Renderer, arguments: Any) -> int:
    """2 where the arguments come out as JSON, 1 where name and value are there at all."""
    text = _rendered(renderer, arguments, _IDS[:1])
    if _AS_JSON.search(text):
        return 2
    return 1 if _KEY in text and f"'{_KEY}'" not in text and f'\\"{_KEY}' not in text else 0


def _rendered(renderer: Renderer, arguments: Any, ids: Sequence[str | None]) -> str:
    """The text of an answer that calls; "" where the template does not take it."""
    function = {"name": _NAME, "arguments": arguments}
    calls = [{**({"id": each} if each else {}), "type": "function", "function": function} for each in ids]
    try:
        return renderer.render(
            [Message("user", "x"), Message("assistant", "", None, {"tool_calls": calls})], None, False
        )
    except TemplateRejects:
        return ""


def as_taken(messages: Sequence[Message], needs: CallNeeds) -> tuple[list[Message], tuple[str, ...]]:
    """The messages with their calls as the template takes them, and what to say of it. Raises RowProblem."""
    taken = [replace(message, extra=_formed(message.extra, needs.as_text)) for message in messages]
    notes: tuple[str, ...] = ()
    if needs.one and any(len(message.extra.get("tool_calls") or ()) > 1 for message in taken):
        taken, notes = _one_by_one(taken), (SPLIT,)
    taken = _with_ids(taken) if needs.ids else taken
    return (with_short_ids(taken) if needs.short_ids else taken), notes


def _formed(extra: dict[str, Any], as_text: bool) -> dict[str, Any]:
    if not extra.get("tool_calls"):
        return extra
    calls = [
        {**call, "function": {**call["function"], "arguments": _arguments(call["function"], as_text)}}
        for call in extra["tool_calls"]
    ]
    return {**extra, "tool_calls": calls}


def _arguments(function: Mapping[str, Any], as_text: bool) -> Any:
    given = function.get("arguments", {})
    if as_text:
        return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    if isinstance(given, str) and given.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(given)
        except ValueError:
            return given
    return given


def _with_ids(messages: Sequence[Message]) -> list[Message]:
    """Calls that have no id get one, and so do results, in the order of the calls."""
    found, waiting, count = [], [], 0
    for message in messages:
        extra = dict(message.extra)
        if extra.get("tool_calls"):
            calls = []
            for call in extra["tool_calls"]:
                count += 1
                calls.append({**call, "id": call.get("id") or f"call{count:05}"})
            extra["tool_calls"] = calls
            waiting = [call["id"] for call in calls]
        elif message.role == "tool":
            given = extra.get("tool_call_id") or extra.get("id") or (waiting[0] if waiting else f"call{count:05}")
            waiting = [each for each in waiting if each != given]
            extra["tool_call_id"] = given
        found.append(replace(message, extra=extra))
    return found


def _one_by_one(messages: Sequence[Message]) -> list[Message]:
    """Each call in a turn of its own, its result behind it."""
    found: list[Message] = []
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        calls = message.extra.get("tool_calls") or ()
        if len(calls) < 2:
            found.append(message)
            continue
        results = []
        while at < len(messages) and messages[at].role == "tool":
            results.append(messages[at])
            at += 1
        found += _alternating(message, results)
    return found


def _alternating(message: Message, results: Sequence[Message]) -> list[Message]:
    calls = message.extra["tool_calls"]
    if len(results) != len(calls):
        raise RowProblem(
            f"the chat template writes one call a turn, and a turn has {len(calls)} with {len(results)} results, so "
            "they cannot be put one after another; give each call a turn and a result of its own, or set "
            "data.chat_template to one that writes several, for example chatml"
        )
    ids = [result.extra.get("tool_call_id") for result in results]
    by_id = {each: result for each, result in zip(ids, results) if each is not None}
    if len(by_id) == len(calls) and all(call.get("id") in by_id for call in calls):
        results = [by_id[call["id"]] for call in calls]
    found: list[Message] = []
    for number, (call, result) in enumerate(zip(calls, results)):
        extra = {**message.extra, "tool_calls": [call]}
        if number:  # what is said beside calls is said once
            extra = {"tool_calls": [call]}
        found += [replace(message, content="" if number else message.content, extra=extra), result]
    return found
