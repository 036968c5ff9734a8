"""From conversations to token ids and the weights with which they are learned, by the model's own chat template.

An answer is found by difference: the template renders the messages before it, opening the assistant's turn (what
generation is prompted with), and then the messages up to it. The difference is what the model has to say. So the tokens
before a learned answer are always the tokens that generation is prompted with. Where a template rewrites history
(Qwen 3 leaves out earlier thinking), no single sequence has this property for all turns, and the conversation becomes
one sequence per answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from topwork.common.errors import DataError
from topwork.data.chat.calls import CallFormat, call_format
from topwork.data.chat.chosen import is_raw, jinja_of, raw_jinja, with_variables
from topwork.data.chat.prepared import Preparer, Tools
from topwork.data.chat.rendering import Renderer, TemplateRejects
from topwork.data.chat.spans import (
    Document,
    Pieces,
    Turn,
    Whole,
    holds,
    learned_parts,
    of_document,
    of_turns,
    of_whole,
    texts_of,
)
from topwork.data.chat.spans import Encoded as Encoded
from topwork.data.chat.turns import LETTERS, Turns
from topwork.data.config import DataConfig
from topwork.data.conversations import BadRow, Conversation, Message, RowProblem

TrainOn = Literal["answers", "last_answer", "all"]
_AT_ONCE = 4096
"""Conversations that are rendered before their texts are tokenized: more would only be held."""
PROVED = 32
"""So many conversations of a call are tokenized a second time, whole, to prove that their pieces make the same ids."""


@dataclass(frozen=True)
class Reading:
    """How rows are read, as the options of the same names in DataConfig have it."""

    thinking: Literal["learn", "inline", "drop"] = "learn"
    lost_text: Literal["refuse", "allow"] = "refuse"
    split_special_tokens: bool | None = None
    merge_turns: bool = False
    response_part: str | None = None
    instruction_part: str | None = None

    @classmethod
    def of(cls, config: DataConfig) -> "Reading":
        """A recipe's."""
        return cls(**{each.name: getattr(config, each.name) for each in fields(cls)})


@dataclass(frozen=True)
class _Plan:
    """What is to be tokenized of a conversation: turns, or one part of another kind; and what is told of it."""

    parts: Sequence[Turn | Whole | Document] = ()
    notes: tuple[str, ...] = ()


class ChatTemplate:
    """`template` is None (the tokenizer's own), `chatml`, `plain`, `raw`, a file, or Jinja; `fold_system`, `separator`
    and `variables` (chat_template_kwargs) as in DataConfig.

    text_markup  whether special tokens that plain text spells are markup; None until it is known
    """

    def __init__(
        self, tokenizer: Any, template: str | None = None, fold_system: bool = False, options: Reading = Reading(),
        separator: str = "", variables: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.options, self.separator = tokenizer, options, separator
        jinja = raw_jinja(tokenizer, separator) if template == "raw" else jinja_of(tokenizer, template)
        self.renderer = Renderer(tokenizer, with_variables(tokenizer, jinja, variables or {}), fold_system)
        self._has_seen_chats = self._has_seen_text = False
        self.text_markup = None if options.split_special_tokens is None else not options.split_special_tokens
        if separator and jinja is not None and not is_raw(jinja):
            raise DataError(
                "data.separator stands between prompt and completion that are read raw, and here a chat template puts "
                "them together; set data.chat_template: raw, or leave data.separator out"
            )

    @classmethod
    def from_config(cls, tokenizer: Any, config: DataConfig, stored: Path | None = None) -> "ChatTemplate":
        """As a recipe has it; `stored` is a run's own, which goes before where it is there. Raises DataError."""
        fold, options = config.fold_system, Reading.of(config)
        if stored is not None and stored.exists():  # its separator and variables stand in it
            return cls(tokenizer, str(stored), fold, options)
        return cls(tokenizer, config.chat_template, fold, options, config.separator, config.chat_template_kwargs)

    @property
    def jinja(self) -> str | None:
        """The template's text, to be saved with a model; None where there is none."""
        return self.renderer.jinja

    @property
    def reading(self) -> str:
        """How prompt and completion are put together, or how plain text is read, for people; "" where a chat template
        does it, and a text is its letters, all of them learned."""
        response, instruction = self.options.response_part, self.options.instruction_part
        if response is not None:
            until = f" until {instruction!r}" if instruction is not None else ""
            return f"of plain text, only what follows {response!r}{until} is learned"
        if self.text_markup and self.options.split_special_tokens is None:
            return "plain text brings its own markup: special tokens that it spells are these tokens"
        if not is_raw(self.jinja):
            return ""
        between = self.renderer.render([Message("user", "x")], None, True).rpartition("x")[2]
        return "prompt and completion one after the other as they are" + (f", separator {between!r}" if between else "")

    @cached_property
    def takes_system(self) -> bool:
        """Whether it renders a system message."""
        try:
            return "topworkprobesystem" in self.renderer.render(
                [Message("system", "topworkprobesystem"), Message("user", "x")], None, True
            )
        except TemplateRejects:
            return False

    @cached_property
    def calls(self) -> CallFormat | None:
        """How the template writes tool calls; None where it has no way of its own."""
        return call_format(self.renderer)

    @cached_property
    def _preparer(self) -> Preparer:
        options = self.options
        return Preparer(self.renderer, options.thinking, options.split_special_tokens is not False, options.merge_turns)

    @cached_property
    def _turns(self) -> Turns:
        return Turns(self.renderer, self._preparer, self.options.lost_text == "allow")

    def prompt_ids(
        self, messages: Sequence[Message], tools: Tools = None, variables: Mapping[str, Any] | None = None,
        goes_on: bool = False, as_learned: bool = False,
    ) -> list[int]:  # fmt: skip
        """What generation is prompted with: the messages and the opened assistant's turn.

        variables   what else the template reads (`enable_thinking`)
        goes_on     the last message is the assistant's and is left open, for the answer to go on with it
        as_learned  an assistant's opening that the template refuses is cut, as it is where rows are learned

        Raises DataError.
        """
        if goes_on and (not messages or messages[-1].role != "assistant" or messages[-1].extra.get("tool_calls")):
            last = messages[-1].role + "'s" if messages else "not there"
            raise DataError(f"an answer goes on with the assistant's text, and the last message is the {last}")
        try:
            prepared = self._preparer.prepared(messages, tools, goes_on)
            text = self._turns.prompt(prepared, variables, goes_on, as_learned)
            text.encode()
        except RowProblem as problem:
            raise DataError(f"these messages cannot be put to the model: {problem}") from problem
        except UnicodeEncodeError as error:
            raise DataError("these messages cannot be put to the model: half a surrogate pair is no text") from error
        except RecursionError as error:
            raise DataError("these messages cannot be put to the model: they are nested too deep") from error
        return self.renderer.tokens.ids([text])[0]

    def encode(self, conversation: Conversation, train_on: TrainOn = "answers") -> list[Encoded]:
        """One sequence, or one per learned answer where the template rewrites history. Raises DataError."""
        (encoded,), bad = self.encode_all([conversation], train_on)
        if bad:
            raise DataError(f"{bad[0].source}: {bad[0].reason}")
        return encoded

    def survey(self, conversations: Sequence[Conversation]) -> None:
        """Settle what rows decide that recipes leave open, by all of them: whether plain text brings its own markup,
        and whether prompt and completion are read raw, where the model has no template. The first call with rows of a
        kind settles it. Raises DataError for marker strings where no row is plain text."""
        seen = {self.surveyed(conversation) for conversation in conversations}
        kinds = {kind for kind, _ in seen}
        if self.text_markup is None and "text" in kinds:
            self.text_markup = ("text", False) not in seen
        asked = "chat" in kinds
        self._has_seen_text = self._has_seen_text or "text" in kinds
        if self.options.response_part is not None and asked and not self._has_seen_text:
            raise DataError(
                "data.response_part says what is learned of plain text, and these rows are conversations, of which the "
                "answers are learned as it is; leave it out"
            )
        undecided, self._has_seen_chats = not self._has_seen_chats, self._has_seen_chats or asked
        if undecided and self.jinja is None and asked and ("chat", False) not in seen:
            jinja = raw_jinja(self.tokenizer, self.separator)
            self.renderer = Renderer(self.tokenizer, jinja, self.renderer.fold_system)
            self.__dict__.pop("_preparer", None)
            self.__dict__.pop("_turns", None)

    def surveyed(self, conversation: Conversation) -> tuple[str, bool]:
        """What `survey` looks at in a row: its kind, and whether it begins or ends in markup, or is a prompt and an
        answer."""
        if conversation.kind == "text":
            tokens, text = self.renderer.tokens, conversation.text or ""
            return "text", text.startswith(tuple(tokens.control)) or tokens.ends_turn(text.rstrip())
        return "chat", _is_pair(conversation)

    def encode_all(
        self, conversations: Sequence[Conversation], train_on: TrainOn = "answers"
    ) -> tuple[list[list[Encoded]], list[BadRow]]:
        """Each conversation's sequences, none for a bad row. Texts are tokenized many at a time.

        Raises DataError where the template cannot do at all what the recipe asks.
        """
        self.survey(conversations)
        encoded: list[list[Encoded]] = []
        bad: list[BadRow] = []
        for start in range(0, len(conversations), _AT_ONCE):
            some, unusable = self._encode_some(conversations[start : start + _AT_ONCE], train_on, not start)
            encoded += some
            bad += unusable
        return encoded, bad

    def _encode_some(
        self, conversations: Sequence[Conversation], train_on: TrainOn, proved: bool
    ) -> tuple[list[list[Encoded]], list[BadRow]]:
        plans: list[_Plan] = []
        bad: list[BadRow] = []
        for number, conversation in enumerate(conversations):
            try:
                plans.append(self._plan(conversation, train_on, proved and number < PROVED))
            except RowProblem as problem:
                plans.append(_Plan())
                bad.append(BadRow(conversation.source, str(problem)))
        tokens = self.renderer.tokens
        texts = list(dict.fromkeys(text for plan in plans for part in plan.parts for text in texts_of(part)))
        ids = dict(zip(texts, tokens.ids(texts)))
        if not all(holds([part for part in plan.parts if isinstance(part, Turn)], ids) for plan in plans[:PROVED]):
            tokens.never_join()
            return self._encode_some(conversations, train_on, proved)
        return [self._encoded(plan, ids) for plan in plans], bad

    def _plan(self, conversation: Conversation, train_on: TrainOn, proved: bool) -> _Plan:
        if conversation.kind == "text":
            return self._document(conversation.text or "")
        prepared = self._preparer.prepared(conversation.messages, conversation.tools)
        if train_on == "all":
            whole, notes = self._turns.whole(prepared)
            return _Plan((whole,), notes)
        turns, notes = self._turns.learned(prepared, train_on == "last_answer")
        pieces = Pieces(self.renderer.tokens)
        parts = [
            Turn(
                pieces.after(turn.prompt), pieces.after(turn.prompt + turn.answer), turn.answer,
                self.renderer.tokens.ends_turn(turn.answer), turn.weight,
                turn.prompt + turn.answer if proved and turn is turns[-1] else None,
            )
            for turn in turns
        ]  # fmt: skip
        return _Plan(parts, notes)

    def _document(self, text: str) -> _Plan:
        tokens, letters, options = self.renderer.tokens, not self.text_markup, self.options
        learned = None
        if options.response_part is not None:
            learned = learned_parts(text, options.response_part, options.instruction_part)
        bos = self.tokenizer.bos_token
        begins = not letters and bool(bos) and text.startswith(bos)
        ends = not letters and tokens.ends_turn(text.rstrip())
        notes = (LETTERS,) if letters and options.split_special_tokens is None and tokens.spells(text) else ()
        return _Plan((Document(tokens.document(text, letters), begins, ends, learned, text, letters),), notes)

    def _encoded(self, plan: _Plan, ids: dict[str, list[int]]) -> list[Encoded]:
        tokens, bos = self.renderer.tokens, self.tokenizer.bos_token_id if self.renderer.adds_bos else None
        if not plan.parts:
            return []
        first = plan.parts[0]
        if isinstance(first, Document):
            found = [of_document(first, ids, tokens, bos, self._eos)]
        elif isinstance(first, Whole):
            found = [of_whole(first, ids, tokens, self._eos)]
        else:
            found = of_turns([part for part in plan.parts if isinstance(part, Turn)], ids, tokens, self._eos)
        if not plan.notes:
            return found
        return [Encoded(each.tokens, each.weights, plan.notes) for each in found]

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "neither the chat template nor the tokenizer has a token that ends a turn, so the model could not "
                "learn to stop; set the tokenizer's eos_token, or a data.chat_template that closes the assistant's turn"
            )
        return int(self.tokenizer.eos_token_id)


def stop_ids(template: ChatTemplate) -> set[int]:
    """The token ids that end the assistant's turn, for generation: those that are learned, and the tokenizer's EOS."""
    return set(template.renderer.end_ids)


def _is_pair(conversation: Conversation) -> bool:
    return not conversation.tools and [message.role for message in conversation.messages] == ["user", "assistant"]
