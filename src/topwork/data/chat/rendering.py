"""A chat template as text: how it renders, and with what it closes the assistant's turn."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

from topwork.common.errors import DataError
from topwork.data.chat.beginnings import Beginnings, Whole
from topwork.data.chat.chosen import adds_bos, check_variables
from topwork.data.chat.compiled import compiled
from topwork.data.chat.markup import Tokens
from topwork.data.conversations import Message

_USER, _ANSWER, _TOOL = "topworkprobeuser", "topworkprobeanswer", "topworkprobetool"


@dataclass(frozen=True)
class Closing:
    """What a template writes after an answer.

    tail    at the end of a conversation: `<|im_end|>\\n`
    text    the part that ends the turn and is learned: `<|im_end|>`; may be empty
    """

    tail: str
    text: str


TODAY = date(2024, 7, 26)
"""What templates that print today's date are told it is (the day that Llama 3's falls back to): else the same rows
would be other tokens tomorrow, and a run resumed after midnight another run."""
_TOLD = 500
"""Letters of a template's complaint that are passed on: transformers puts the whole conversation into some."""
_ASKS_THE_DAY = re.compile(r"""strftime_now\(\s*(['"])(.+?)\1\s*\)""")


def _on_one_day(jinja: str) -> str:
    """The template with its questions for the date answered; transformers lets nobody pass it another clock."""
    return _ASKS_THE_DAY.sub(lambda call: repr(TODAY.strftime(call.group(2))), jinja)


class Renderer:
    """A tokenizer and a template's Jinja; None where there is no template."""

    def __init__(self, tokenizer: Any, jinja: str | None, fold_system: bool = False) -> None:
        self.tokenizer = tokenizer
        self.fold_system = fold_system
        self.jinja = jinja
        self.adds_bos = adds_bos(tokenizer)

    def render(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, prompt: bool,
        variables: Mapping[str, Any] | None = None, goes_on: bool = False,
    ) -> str:  # fmt: skip
        """The template's text; `prompt` opens the assistant's turn at the end, `goes_on` leaves the last message open.

        variables: what else the template may read (`enable_thinking`). Raises DataError where there is no template, it
        is no valid Jinja or a variable is not to be set, and TemplateRejects where the template raises on these
        messages.
        """
        from jinja2.exceptions import TemplateError

        if self.jinja is None:
            raise DataError(
                "this model's tokenizer has no chat template, and the data are conversations; set data.chat_template: "
                "chatml, plain (question, new line, answer), raw (prompt and completion as they are), or a Jinja FILE"
            )
        given = [_as_dict(message) for message in (folded(messages) if self.fold_system else messages)]
        if not given:
            raise TemplateRejects("there is no message")
        check_variables(self.tokenizer, variables or {})
        template = self._compiled
        try:
            if goes_on:
                return self._left_open(given, tools, variables or {})
            return str(template.render(
                messages=given, tools=tools, documents=None, add_generation_prompt=prompt,
                **{**self._named, **(variables or {})},
            ))  # fmt: skip
        except RecursionError as error:
            raise TemplateRejects("they are nested too deep") from error
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateRejects(str(error)[:_TOLD]) from error

    @cached_property
    def _compiled(self) -> Any:
        """Compiled once, and kept."""
        from jinja2.exceptions import TemplateSyntaxError

        try:
            return compiled(self.tokenizer, _on_one_day(self.jinja or ""))
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template is no valid Jinja: line {error.lineno}: {error.message}") from error

    def whole(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> Whole | None:
        """The conversation with all its beginnings, each as `render` has it; None where they must be rendered one by
        one."""
        if not self._beginnings.possible or (self.fold_system and any(each.role == "system" for each in messages)):
            return None
        given = [_as_dict(message) for message in messages]
        variables = {"tools": tools, "documents": None, **self._named}
        try:
            parts = self._beginnings.parts(given, {"add_generation_prompt": False, **variables})
            opened = self._beginnings.parts(given[:1], {"add_generation_prompt": True, **variables})
        except Exception:  # a template may raise anything; rendered one by one, it is told of what
            return None
        return Whole(parts, opened[-1]) if parts is not None and opened is not None else None

    @cached_property
    def _beginnings(self) -> Beginnings:
        return Beginnings(self._compiled, _on_one_day(self.jinja or ""))

    @cached_property
    def _named(self) -> dict[str, Any]:
        return dict(self.tokenizer.special_tokens_map)

    def _left_open(
        self, given: list[dict[str, Any]], tools: list[dict[str, Any]] | None, variables: Mapping[str, Any]
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                given,
                tools=tools,
                chat_template=_on_one_day(self.jinja or ""),
                continue_final_message=True,
                tokenize=False,
                **variables,
            )
        )

    def generated(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where in it the template's `{% generation %}` marks begin and end."""
        blocks: list[str] = []
        marks: list[tuple[int, int]] = []
        given = [_as_dict(message) for message in (folded(messages) if self.fold_system else messages)]
        with self._compiled.environment.activate_tracker(blocks, marks):
            for block in self._compiled.generate(
                messages=given, tools=tools, documents=None, add_generation_prompt=False, **self._named
            ):
                blocks.append(block)
        return "".join(blocks), marks

    @cached_property
    def marks_generation(self) -> bool:
        """Whether the template says by `{% generation %}` what is to be learned."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.jinja or "") is not None

    @cached_property
    def tokens(self) -> Tokens:
        """The tokenizer, told what the template writes around messages."""
        return Tokens(self.tokenizer, self._around())

    @property
    def special(self) -> dict[str, int]:
        """Text -> id of the tokens that no ordinary text becomes."""
        return self.tokens.special

    def _around(self) -> str:
        """What the template writes around a conversation's messages; "" where it renders none."""
        chat = [Message("system", "x"), Message("user", "x"), Message("assistant", "x"), Message("user", "x")]
        for tried in (chat, chat[1:], chat[1:2]):
            try:
                return self.render(tried, None, True)
            except (TemplateRejects, DataError):
                continue
        return ""

    @cached_property
    def closing(self) -> Closing:
        """Found by asking the template: what follows an answer at the end, and what follows it before another turn."""
        chat = [Message("user", _USER), Message("assistant", _ANSWER)]
        try:
            tail = self.render(chat, None, False).rpartition(_ANSWER)[2]
        except TemplateRejects as error:
            raise DataError(f"the chat template renders no conversation of user and assistant: {error}") from error
        try:
            between = self.render([*chat, Message("user", _USER)], None, False).rpartition(_ANSWER)[2]
        except TemplateRejects:
            between = tail
        return Closing(tail, self._closing_text(tail, between))

    def _closing_text(self, tail: str, between: str) -> str:
        pieces, shared = self.tokens.pieces(tail), 0
        for ours, theirs in zip(pieces, self.tokens.pieces(between)):
            if ours != theirs:
                break
            shared += 1
        common = "".join(pieces[:shared]).rstrip()
        if self.tokens.ends_turn(common):
            return common
        first = next((number for number, piece in enumerate(pieces, 1) if piece in self.tokens.control), 0)
        if first:
            return "".join(pieces[:first])
        return tail.rstrip() if between.startswith(tail) else ""

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The ids by which the assistant's turn ends: after an answer, after a tool call, and the tokenizer's EOS."""
        ends = {self.tokenizer.eos_token_id} - {None}
        if self.jinja is not None:
            call = {"type": "function", "function": {"name": _TOOL, "arguments": {}}}
            texts = [self.closing.text]
            try:
                chat = [Message("user", _USER), Message("assistant", "", None, {"tool_calls": [call]})]
                rendered = self.render(chat, None, False)
                texts += [self.cut(rendered.rpartition(_TOOL)[2])] if _TOOL in rendered else []
            except TemplateRejects:
                pass
            ends |= {self.special[self.tokens.pieces(text)[-1]] for text in texts if self.tokens.ends_turn(text)}
        return frozenset(ends)

    def cut(self, text: str) -> str:
        """A text that ends with an assistant's turn, without what the template writes after the end of the turn."""
        closing = self.closing
        if closing.tail and text.endswith(closing.tail):
            return text[: len(text) - len(closing.tail)] + closing.text
        bare = text.rstrip()
        return bare if self.tokens.ends_turn(bare) else text


class TemplateRejects(Exception):
    """The template raised on these messages; the text is the template's own."""


def folded(messages: Sequence[Message]) -> list[Message]:
    """The system message at the head of the first user turn, an empty line between."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    rest = [message for message in messages if message.role != "system"]
    first = next((number for number, message in enumerate(rest) if message.role == "user"), None)
    if not system.strip() or first is None:
        return rest
    user = rest[first]
    rest[first] = Message("user", f"{system}\n\n{user.content}", user.weight, user.extra)
    return rest


def _as_dict(message: Message) -> dict[str, Any]:
    if not message.extra:
        return {"role": message.role, "content": message.content}
    extra = {key: value for key, value in message.extra.items() if value is not None}
    return {**extra, "role": message.role, "content": message.content}
