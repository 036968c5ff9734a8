"""How a chat template writes tool calls, found by asking it; and messages that say the same in text where it cannot."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from topwork.data.chat.rendering import Renderer, TemplateRejects
from topwork.data.conversations import Message

ToolList = list[dict[str, Any]]

_NAME, _KEY, _RESULT = "topworkprobetool", "topworkprobekey", "topworkproberesult"
_SHORT_ID, _LONG_ID = "topwork01", "call_0123456789abcdef"
_ARGUMENTS = r"\{\s*\"" + _KEY + r"\":\s*1\s*\}"
_CALL = re.compile(
    r"(?P<head>\{\s*\"name\":\s*\")" + _NAME + r"(?P<middle>\",\s*\"(?:arguments|parameters)\":\s*)" + _ARGUMENTS
    + r"(?P<tail>[^{}]*\})"
)  # fmt: skip
_CALL_NAME_LAST = re.compile(r"\{\s*\"arguments\":\s*" + _ARGUMENTS + r",\s*\"name\":\s*\"" + _NAME + r"\"\s*\}")
_TAG = re.compile(r"(?P<tag>[^\s\w]\S*)(?P<space>\s*)$")


@dataclass(frozen=True)
class CallFormat:
    """The text of a call: opens, head, the name, middle, the arguments as JSON, tail, closes; `between` and the next.

    Qwen's: `<tool_call>\\n`, `{"name": "`, `", "arguments": `, `}`, `\\n</tool_call>`, `\\n`.

    opens    "" where a call is all that is said (llama 3)
    between  None where a turn has one call at most
    listed   opens and closes stand around a list of all calls (mistral)
    short_ids  the template takes ids of nine letters and digits only (mistral)
    """

    opens: str
    head: str
    middle: str
    tail: str
    closes: str
    between: str | None
    listed: bool = False
    short_ids: bool = False


HERMES = CallFormat("<tool_call>\n", '{"name": "', '", "arguments": ', "}", "\n</tool_call>", "\n")
"""What most open models were taught (Hermes, Qwen), and what a model whose template knows no tools is asked for."""


def call_format(renderer: Renderer) -> CallFormat | None:
    """How the template writes calls; None where it leaves out tools, calls or results, or writes calls that are no JSON
    of a name and arguments."""
    asked, tools, one = Message("user", "x"), [_probe_tool()], _probe_answer(_SHORT_ID)
    result = Message("tool", _RESULT, None, {"tool_call_id": _SHORT_ID, "name": _NAME})
    try:
        told = renderer.render([asked], tools, True)
        if _NAME not in told or _RESULT not in renderer.render([asked, one, result], tools, True):
            return None
        # without tools, since some templates put them before the last message, whoever's it is
        found = _found(renderer, renderer.render([asked], None, True), renderer.render([asked, one], None, False))
    except TemplateRejects:
        return None
    if found is None:
        return None
    found = replace(found, between=_between(renderer, [asked, _probe_answer(_SHORT_ID, _SHORT_ID[::-1])], found))
    try:
        renderer.render([asked, _probe_answer(_LONG_ID)], None, False)
    except TemplateRejects:
        return replace(found, short_ids=True)
    return found


def _probe_tool() -> dict[str, Any]:
    parameters = {"type": "object", "properties": {_KEY: {"type": "integer", "description": "x"}}, "required": [_KEY]}
    return {"type": "function", "function": {"name": _NAME, "description": "x", "parameters": parameters}}


def _probe_answer(*ids: str) -> Message:
    function = {"name": _NAME, "arguments": {_KEY: 1}}
    calls = [{"id": each, "type": "function", "function": function} for each in ids]
    return Message("assistant", "", None, {"tool_calls": calls})


def _found(renderer: Renderer, prompt: str, answered: str) -> CallFormat | None:
    """What stands around the call after what generation is prompted with."""
    start = next((at for at, (ours, theirs) in enumerate(zip(prompt, answered)) if ours != theirs), len(prompt))
    call, form = _CALL.search(answered, start), HERMES
    if call is not None:
        tail = "}" if _SHORT_ID in call["tail"] else call["tail"]
        form = replace(HERMES, head=call["head"], middle=call["middle"], tail=tail)
    else:
        call = _CALL_NAME_LAST.search(answered, start)
    if call is None:
        return None
    before, after = answered[start : call.start()], answered[call.end() :]
    ends = [text for text, number in renderer.special.items() if number in renderer.end_ids and text in after]
    closes = after[: min(map(after.index, ends))] if ends else after
    listed = before.rstrip().endswith("[") and closes.lstrip().startswith("]")
    if listed:
        before, closes = before.rstrip()[:-1], closes.lstrip()[1:]
    tag = _TAG.search(before)
    if before.strip() and tag is None:
        return None
    return replace(form, opens=tag[0] if tag else "", closes=closes.rstrip(), listed=listed)


def _between(renderer: Renderer, messages: Sequence[Message], form: CallFormat) -> str | None:
    """What stands between two calls."""
    try:
        answered = renderer.render(messages, None, False)
    except TemplateRejects:
        return None
    calls = [*_CALL.finditer(answered), *_CALL_NAME_LAST.finditer(answered)]
    if len(calls) != 2:
        return None
    text = answered[calls[0].end() : calls[1].start()]
    if form.listed:
        return text
    if not text.startswith(form.closes) or not text.endswith(form.opens):
        return None
    return text[len(form.closes) : len(text) - len(form.opens)]


def with_short_ids(messages: Sequence[Message]) -> list[Message]:
    """The calls' ids as nine letters and digits, the same for the same id."""
    return [replace(message, extra=_shortened(message.extra)) for message in messages]


def _shortened(extra: dict[str, Any]) -> dict[str, Any]:
    changed = dict(extra)
    if extra.get("tool_calls"):
        changed["tool_calls"] = [
            {**call, "id": _short(call.get("id", number))} for number, call in enumerate(extra["tool_calls"])
        ]
    if "tool_call_id" in extra:
        changed["tool_call_id"] = _short(extra["tool_call_id"])
    return changed


def _short(given: object) -> str:
    text = str(given)
    return text if re.fullmatch("[a-zA-Z0-9]{9}", text) else sha256(text.encode("utf-8", "replace")).hexdigest()[:9]


def in_text(messages: Sequence[Message], tools: ToolList | None) -> list[Message]:
    """Messages for a template that knows no tools: they are told of in the system message, calls stand in the
    assistant's text, and results are the user's to say. The words are chatml.jinja's, which are Qwen's."""
    told: list[Message] = []
    for message in messages:
        if message.role == "tool":
            text = f"<tool_response>\n{message.content}\n</tool_response>"
            if told and told[-1].role == "user" and told[-1].content.endswith("</tool_response>"):
                told[-1] = Message("user", f"{told[-1].content}\n{text}")
            else:
                told.append(Message("user", text))
        elif message.extra.get("tool_calls"):
            calls = [_written(call["function"]) for call in message.extra["tool_calls"]]
            extra = {key: value for key, value in message.extra.items() if key != "tool_calls"}
            parts = [*([message.content] if message.content else []), *calls]
            told.append(Message(message.role, "\n".join(parts), message.weight, extra))
        else:
            told.append(message)
    if not tools:
        return told
    first = told[0].content if told and told[0].role == "system" else ""
    system = Message("system", f"{first}\n\n{_told(tools)}" if first else _told(tools))
    return [system, *(told[1:] if told and told[0].role == "system" else told)]


def _told(tools: ToolList) -> str:
    listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
        f"function signatures within <tools></tools> XML tags:\n<tools>{listed}\n</tools>\n\nFor each function call, "
        "return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _written(function: dict[str, Any]) -> str:
    given = function.get("arguments", {})
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    form = HERMES
    return form.opens + form.head + function["name"] + form.middle + arguments + form.tail + form.closes
