"""Thinking in answers: the names that rows have for it, and how a chat template writes it, found by asking.

Rows hold it in a field of the message (`reasoning_content`, `thinking` ...) or in the answer (`<think>…</think>`).
Templates write a field, or keep what stands in the answer, or take it out (R1's, for earlier turns), or know none.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from topwork.data.chat.rendering import Renderer, TemplateRejects
from topwork.data.conversations import Message, RowProblem
from topwork.data.meaning.marks import THINKING_KEYS

Mode = Literal["learn", "inline", "drop"]
KEYS = THINKING_KEYS
THINKS = _CLOSE = "</think>"
_OPEN = "<think>"
_BLOCK = re.compile(r"(?s)<think>.*?</think>\s*")
_CLOSED = re.compile(r"<think>\s*</think>\s*$")
_OPENED = re.compile(r"<think>\s*$")
_THOUGHT, _SAID = "topworkprobethought", "topworkprobeanswer"
DROPPED = "thinking is left out (data.thinking: drop)"


@dataclass(frozen=True)
class ThinkingForm:
    """How a template has thinking in the last answer.

    key     the message's field that it writes; None where it reads none
    strips  it takes <think>…</think> out of an answer
    """

    key: str | None
    strips: bool


def thinking_form(renderer: Renderer) -> ThinkingForm:
    """Found by asking the template."""
    key = next((name for name in KEYS if _shows(renderer, _SAID, {name: _THOUGHT})), None)
    inline = _shows(renderer, f"{_OPEN}\n{_THOUGHT}\n{_CLOSE}\n\n{_SAID}", {})
    return ThinkingForm(key, not inline and _shows(renderer, _SAID, {}, _SAID))


def _shows(renderer: Renderer, content: str, extra: dict[str, Any], wanted: str = _THOUGHT) -> bool:
    try:
        return wanted in renderer.render(
            [Message("user", "x"), Message("assistant", content, None, extra)], None, False
        )
    except TemplateRejects:
        return False


def thought_of(message: Message) -> dict[str, str]:
    """The fields of the message that hold thinking. Raises RowProblem for what is no text."""
    found = {}
    for key in KEYS:
        value = message.extra.get(key)
        if value is None or value == "" or value == []:
            continue
        if not isinstance(value, str):
            raise RowProblem(f"{key} is of type {type(value).__name__}, expected text")
        found[key] = value
    return found


def written(message: Message, form: ThinkingForm, mode: Mode) -> tuple[Message, tuple[str, ...]]:
    """An assistant's message with its thinking where the template looks for it, and what to say of it.

    A field that the template does not read stays, for the proof that nothing is lost to find. Raises RowProblem where
    nothing else is left of an answer.
    """
    if not message.extra.keys() & set(KEYS) and _CLOSE not in message.content:
        return message, ()
    fields = thought_of(message)
    extra = {key: value for key, value in message.extra.items() if key not in KEYS}
    if mode == "drop":
        content = without_thinking(message.content)
        if not content.strip() and not extra.get("tool_calls"):
            raise RowProblem("nothing to learn: the answer is thinking alone, and data.thinking is drop")
        dropped = bool(fields) or content != message.content
        return replace(message, content=content, extra=extra), (DROPPED,) if dropped else ()
    known = {"", *map(str.strip, parts(message.content)[0])}
    texts = [text for text in dict.fromkeys(fields.values()) if text.strip() not in known]
    if not texts:
        return replace(message, extra=extra), ()
    thought = "\n\n".join(texts)
    if mode == "inline" or (form.key is None and form.strips):
        return replace(message, content=f"{_OPEN}\n{thought.strip()}\n{_CLOSE}\n\n{message.content}", extra=extra), ()
    return replace(message, extra={**extra, form.key or KEYS[0]: thought}), ()


def parts(content: str) -> tuple[list[str], list[str]]:
    """An answer's thinking, and the rest of it."""
    if _CLOSE not in content:
        return [], [content]
    head, _, rest = content.partition(_CLOSE)
    before, opened, inner = head.rpartition(_OPEN)
    deeper, others = parts(rest)
    return [inner if opened else head, *deeper], [before if opened else "", *others]


def without_thinking(content: str) -> str:
    """An answer less its <think>…</think>, and less what stands before a </think> that the prompt had opened."""
    left = _BLOCK.sub("", content)
    return left.rpartition(_CLOSE)[2].lstrip() if _CLOSE in left else left


def opening(prompt: str) -> str:
    """The text by which a prompt opens the thinking of an answer, as some templates do; "" where it does not."""
    found = _OPENED.search(prompt)
    return found[0] if found else ""


def is_closed(prompt: str) -> bool:
    """Whether a prompt has thinking opened and closed again, empty."""
    return _CLOSED.search(prompt) is not None


def after_opening(content: str, opening: str) -> str:
    """An answer that goes on where the prompt has opened its thinking."""
    begun = content.lstrip()
    if not begun.startswith(_OPEN):
        return content
    return begun.removeprefix(_OPEN).removeprefix(opening.partition(_OPEN)[2])


def is_cut_off(content: str) -> bool:
    """Whether the answer begins with thinking that does not end: there is no answer, and its end would be learned."""
    return content.lstrip().startswith(_OPEN) and _CLOSE not in content


def has_thinking(content: str) -> bool:
    """Whether the answer holds thinking between tags."""
    return _CLOSE in content


def extra_thought(extra: Mapping[str, Any]) -> list[str]:
    """The texts of fields that hold thinking."""
    return [value for key, value in extra.items() if key in KEYS and isinstance(value, str)]
