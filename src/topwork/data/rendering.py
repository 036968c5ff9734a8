"""A chat template as text and token ids: which one, how it renders, and with what it closes the assistant's turn."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

from topwork.common.errors import DataError, did_you_mean
from topwork.data.conversations import Message

_SHIPPED = Path(__file__).parent / "templates"
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
    """A tokenizer and a template: None (the tokenizer's own), `chatml`, `plain`, a file, or Jinja itself."""

    def __init__(self, tokenizer: Any, template: str | None, fold_system: bool) -> None:
        self.tokenizer = tokenizer
        self.fold_system = fold_system
        self.jinja = _load(tokenizer, template)
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
        from jinja2.exceptions import TemplateError, TemplateSyntaxError

        if self.jinja is None:
            raise DataError(
                "this model's tokenizer has no chat template, and the data are conversations; set data.chat_template: "
                "chatml, plain (question, new line, answer), or a Jinja FILE"
            )
        given = [_as_dict(message) for message in (folded(messages) if self.fold_system else messages)]
        self._check_variables(variables or {})
        try:
            text = self.tokenizer.apply_chat_template(
                given,
                tools=tools,
                chat_template=_on_one_day(self.jinja),
                add_generation_prompt=prompt,
                continue_final_message=goes_on,
                tokenize=False,
                **(variables or {}),
            )
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template is no valid Jinja: line {error.lineno}: {error.message}") from error
        except RecursionError as error:
            raise TemplateRejects("they are nested too deep") from error
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise TemplateRejects(str(error)[:_TOLD]) from error
        return str(text)

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        """Raises DataError for names that the renderer or the tokenizer gives to the template."""
        own = {*signature(self.tokenizer.apply_chat_template).parameters, *self.tokenizer.special_tokens_map}
        for name in variables:
            if name in own | {"self", "messages", "raise_exception", "strftime_now"}:
                raise DataError(
                    f"the template's variable {name!r} is not to be set from outside; leave it out, and give only what "
                    "the template reads beside messages and tools, as enable_thinking"
                )

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts. Nothing is added: the template writes the BOS itself where there is one."""
        if not texts:
            return []
        return list(self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"])

    def ids_after(self, text: str) -> list[int]:
        """The ids of a text that continues another, without the space that some tokenizers put at a text's head."""
        for anchor in ("\n", ":", self.tokenizer.eos_token or ""):
            whole, head = self.ids([anchor + text, anchor]) if anchor else (self.ids([text])[0], [])
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self.ids([text])[0]

    @cached_property
    def special(self) -> dict[str, int]:
        """Text -> id of the tokens that no ordinary text becomes."""
        added = {token.content: index for index, token in self.tokenizer.added_tokens_decoder.items()}
        named = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids))
        return {text: index for text, index in {**added, **named}.items() if text.strip()}

    def pieces(self, text: str) -> list[str]:
        """The text cut at special tokens, these included."""
        return [piece for piece in self._cut_at.split(text) if piece]

    @cached_property
    def _cut_at(self) -> re.Pattern[str]:
        known = sorted(self.special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, known))})" if known else "(?!)")

    def ends_turn(self, text: str) -> bool:
        """Whether the text ends in a special token, by which generation can stop."""
        pieces = self.pieces(text)
        return bool(pieces) and pieces[-1] in self.special

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
        pieces, shared = self.pieces(tail), 0
        for ours, theirs in zip(pieces, self.pieces(between)):
            if ours != theirs:
                break
            shared += 1
        common = "".join(pieces[:shared]).rstrip()
        if self.ends_turn(common):
            return common
        first = next((number for number, piece in enumerate(pieces, 1) if piece in self.special), 0)
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
            ends |= {self.special[self.pieces(text)[-1]] for text in texts if self.ends_turn(text)}
        return frozenset(ends)

    def cut(self, text: str) -> str:
        """A text that ends with an assistant's turn, without what the template writes after the end of the turn."""
        closing = self.closing
        if closing.tail and text.endswith(closing.tail):
            return text[: len(text) - len(closing.tail)] + closing.text
        bare = text.rstrip()
        return bare if self.ends_turn(bare) else text


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
    return {**message.extra, "role": message.role, "content": message.content}


def _load(tokenizer: Any, template: str | None) -> str | None:
    """The template's Jinja; None where the tokenizer has none. Raises DataError for a file that is not there."""
    if template is None:
        own = getattr(tokenizer, "chat_template", None)
        if isinstance(own, dict):
            return str(own.get("default") or next(iter(own.values())))
        return own
    if "{{" in template or "{%" in template:
        return template
    shipped = {path.stem: path for path in _SHIPPED.glob("*.jinja")}
    path = shipped.get(template, Path(template).expanduser())
    if not path.is_file():
        raise DataError(
            f"data.chat_template is {template!r}, which is no file{did_you_mean(template, shipped)}; "
            f"expected {', '.join(sorted(shipped))}, or a Jinja file"
        )
    try:
        jinja = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"the chat template {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    return "{{- bos_token }}" + jinja if template in shipped and adds_bos(tokenizer) else jinja


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS before a plain text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
