"""Messages as a chat template takes them, the same for training and for generation.

Thinking goes where the template looks for it, calls get the form that it writes, and special tokens that people spell
are marked as their letters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from topwork.data.chat.call_turns import CallNeeds, as_taken, call_needs
from topwork.data.chat.rendering import Renderer
from topwork.data.chat.thinking import KEYS, Mode, ThinkingForm, has_thinking, thinking_form, written
from topwork.data.conversations import Message, RowProblem
from topwork.data.meaning.usable import merged_turns

Tools = list[dict[str, Any]] | None
LETTERS = "special tokens that its text spells are read as letters (data.split_special_tokens)"
ENDED = (
    "an answer's own text ends in a special token, whose letters are learned before the end of the turn; take them "
    "out, or set data.split_special_tokens: false where all rows bring their own markup"
)


@dataclass(frozen=True)
class Prepared:
    """Messages and tools for the renderer, and what was changed on the way."""

    messages: tuple[Message, ...]
    tools: Tools
    notes: tuple[str, ...] = ()


class Preparer:
    """`thinking` and `merge` (turns) as in DataConfig; `split`: special tokens that rows spell are letters."""

    def __init__(self, renderer: Renderer, thinking: Mode = "learn", split: bool = True, merge: bool = False) -> None:
        self.renderer, self.thinking, self.split, self.merge = renderer, thinking, split, merge

    @cached_property
    def form(self) -> ThinkingForm:
        """How the template writes thinking."""
        return thinking_form(self.renderer)

    @cached_property
    def needs(self) -> CallNeeds:
        """What the template wants of calls."""
        return call_needs(self.renderer)

    def prepared(self, messages: Sequence[Message], tools: Tools, goes_on: bool = False) -> Prepared:
        """Raises RowProblem. With `goes_on` the last message is left as it is, to be gone on with."""
        notes: tuple[str, ...] = ()
        last = [messages[-1]] if goes_on else []
        ready = list(messages[: len(messages) - len(last)])
        ready = list(merged_turns(ready)) if self.merge else ready
        if any(_thinks(message) for message in ready):
            ready, notes = self._with_thinking(ready)
        if any(message.role == "tool" or message.extra.get("tool_calls") for message in ready):
            try:
                ready, told = as_taken(ready, self.needs)
            except RecursionError as error:
                raise RowProblem("a tool call's arguments are nested too deep") from error
            notes += told
        return self._marked([*ready, *last], tools, notes)

    def _with_thinking(self, messages: Sequence[Message]) -> tuple[list[Message], tuple[str, ...]]:
        found: list[Message] = []
        notes: tuple[str, ...] = ()
        for message in messages:
            if _thinks(message):
                message, told = written(message, self.form, self.thinking)
                notes += told
            found.append(message)
        return found, tuple(dict.fromkeys(notes))

    def _marked(self, messages: Sequence[Message], tools: Tools, notes: tuple[str, ...]) -> Prepared:
        if not self.split:
            return Prepared(tuple(messages), tools, notes)
        tokens = self.renderer.tokens
        spelled = False
        found = []
        for message in messages:
            content = tokens.marked(message.content)
            extra = tokens.marked(message.extra) if message.extra else message.extra
            if content != message.content or extra != message.extra:
                if message.role == "assistant" and tokens.ends_turn(message.content.rstrip()):
                    notes = (*notes, ENDED)
                message, spelled = replace(message, content=content, extra=extra), True
            found.append(message)
        told = tokens.marked(tools) if tools else tools
        spelled = spelled or told != tools
        notes = (*dict.fromkeys(notes), LETTERS) if spelled else notes
        return Prepared(tuple(found), told, notes)


def _thinks(message: Message) -> bool:
    return message.role == "assistant" and (
        has_thinking(message.content) or (bool(message.extra) and not message.extra.keys().isdisjoint(KEYS))
    )
