"""Which tokens of a conversation are learned: prompts and answers, rendered turn by turn by transformers itself.

The definition, for the answer that is message k:

- the prompt is what `apply_chat_template` makes of the messages before it with `add_generation_prompt`, as token ids;
- the answer is what the model must emit after that so that the turn is as the template writes it: what stands between
  the generation prompt and the end of the turn where the template renders the messages up to k, the end included;
- its ids are the rest of the tokenization of prompt and answer together, or, where a merge would cross the boundary, of
  the answer alone.

What cannot be read off a template without knowing it is told (`Known`): how its turns end, how much of an answer the
generation prompt already opens, whether it strips thinking, whether arguments are text.

Rendered text goes to the tokenizer whole, unless a message's own text spells special tokens, which are letters there.
Every such spelling, in whatever text of messages and tools, gives way to a mark of plain letters before rendering, and
comes back into the pieces between the special tokens of the rendered text, which a copy of the tokenizer that knows no
special tokens turns into ids. This covers templates that copy, trim, escape as JSON or look for `<think>`, and not
those that look for special tokens in content or cut text by its length; and tokenizers in which each piece between
special tokens is tokenized for itself: all fast ones but those whose special tokens take the white space beside them
(or are pieces of a Unigram model).
Added tokens that are not special (`<think>` of many models) are tokens wherever they stand.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tokenizers import Tokenizer

Turn = Mapping[str, Any]
_MARK = re.compile(r"Qz([0-9]+)zQ")


@dataclass(frozen=True)
class Known:
    """What one knows of a template.

    ends    the texts that end an assistant's turn, any of them; an EOS is added to what is no special token
    opens   what of the answer the generation prompt already holds
    strips  whether it leaves out thinking that stands in the content: it is learned as it stands there
    text_arguments  whether it wants a call's arguments as JSON text
    """

    ends: tuple[str, ...] = ()
    opens: str = ""
    strips: bool = False
    text_arguments: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """`learned` follows `prompt`; both are token ids. `text` is what is learned, for people."""

    number: int
    prompt: list[int]
    learned: list[int]
    text: str


class NotWritten(Exception):
    """The template writes the answer nowhere after the prompt that generation will be given, or loses a part of it."""


class Incremental:
    """The reading of a tokenizer and a template.

    own  whether the template is the model's own, which writes a BOS or wants none; the text of another begins with a
         BOS where the tokenizer puts one before any
    """

    def __init__(self, tokenizer: Any, template: str, known: Known, own: bool = True) -> None:
        self.tokenizer, self.template, self.known = tokenizer, template, known
        tokens = tokenizer.added_tokens_decoder.values()
        self.special = sorted((token.content for token in tokens if token.special), key=len, reverse=True)
        self._at_special = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")
        adds_bos = not own and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        self._bos = tokenizer.bos_token if adds_bos else ""

    def answers(self, messages: Sequence[Turn], tools: Sequence[Turn] | None) -> Iterator[Answer]:
        """One for each assistant turn that is not the first message. Raises NotWritten."""
        marked, marked_tools = self._marked(messages), self._marked(tools)
        for number, message in enumerate(messages):
            if message["role"] == "assistant" and number:
                yield self._answer(marked[: number + 1], marked_tools, number)

    def _answer(self, messages: list[Any], tools: Any, number: int) -> Answer:
        before = self._render(messages[:-1], tools, True)
        after = self._own(messages, tools, before)
        prompt, answer = self._ids(before), self._ids(before + after)
        self._nothing_lost(messages, tools or [], before, after)
        eos = [] if any(after.endswith(end) for end in self.special) else [self.tokenizer.eos_token_id]
        learned = answer[len(prompt) :] if answer[: len(prompt)] == prompt else self._alone(after)
        return Answer(number, prompt, learned + eos, self._spelled(after))

    def _own(self, messages: list[Any], tools: Any, before: str) -> str:
        """What is to be emitted after `before`."""
        history, whole = self._render(messages[:-1], tools, False), self._render(messages, tools, False)
        if self.known.strips and "</think>" in messages[-1]["content"]:
            stand_in = {**messages[-1], "content": "Qz999zQ"}
            whole = self._render([*messages[:-1], stand_in], tools, False)
            whole = whole.replace(stand_in["content"], messages[-1]["content"])
        asked = before.removesuffix(self.known.opens)
        if whole.startswith(asked):
            start = len(asked)
        else:  # writing the turn changed the history, which generation will not see: the last opening is its own
            opening = asked[len(_common(asked, history)) :]
            start = whole.rfind(opening) + len(opening) if opening and opening in whole else -1
        if start < 0:
            raise NotWritten("no answer follows the prompt")
        answer = whole[start:]
        if not answer.startswith(self.known.opens):
            raise NotWritten(f"the answer does not begin with {self.known.opens!r}")
        return self._to_its_end(answer[len(self.known.opens) :], messages[-1]["content"])

    def _to_its_end(self, answer: str, content: str) -> str:
        ends = [answer.rindex(end) + len(end) for end in self.known.ends if end in answer]
        if ends:
            return answer[: max(ends)]
        kept, space = content.rstrip(), content[len(content.rstrip()) :]
        end = answer.rindex(kept) + len(kept)
        return answer[:end] + (space if answer[end:].startswith(space) else "")

    def _nothing_lost(self, messages: Sequence[Turn], tools: Sequence[Turn], before: str, after: str) -> None:
        asked = [message["content"] for message in messages if message["role"] != "assistant"]
        asked += [tool["function"]["name"] for tool in tools]
        answer = messages[-1]
        told = [*re.split(r"</?think>", answer["content"]), answer.get("reasoning_content", "")]
        for call in answer.get("tool_calls", ()):
            told += [call["function"]["name"], *_leaves(call["function"]["arguments"])]
        for where, texts in ((before, asked), (after, told)):
            for text in map(str.strip, texts):
                if text not in where and _json(text)[1:-1] not in where:
                    raise NotWritten(f"the template leaves out {text!r}")

    def _render(self, messages: list[Any], tools: Any, asks: bool) -> str:
        given = messages
        if self.known.text_arguments:
            given = [_with_text_arguments(message) for message in messages]
        return self._bos + self.tokenizer.apply_chat_template(
            given, tools=tools, chat_template=self.template, add_generation_prompt=asks, tokenize=False,
            **self.known.variables,
        )  # fmt: skip

    def _ids(self, marked: str) -> list[int]:
        if not _MARK.search(marked):
            return self.tokenizer(marked, add_special_tokens=False)["input_ids"]
        pieces = [piece for piece in self._at_special.split(marked) if piece]
        return [number for at, piece in enumerate(pieces) for number in self._piece(piece, at == 0)]

    def _piece(self, piece: str, first: bool) -> list[int]:
        if piece in self.special:
            return [self.tokenizer.convert_tokens_to_ids(piece)]
        letters = _only_letters(self.tokenizer.backend_tokenizer.to_str(), first)
        return letters.encode(self._spelled(piece), add_special_tokens=False).ids

    def _alone(self, after: str) -> list[int]:
        """The ids of an answer that no letter before it is merged with."""
        for before in ("\n", "x", ".", "é", "\x01"):
            alone, both = self._ids(before), self._ids(before + after)
            if both[: len(alone)] == alone:
                return both[len(alone) :]
        raise AssertionError(f"no letter before {after!r} stands alone")

    def _marked(self, value: Any) -> Any:
        """Text of messages and tools with a mark for each special token that it spells."""
        if isinstance(value, str):
            return self._at_special.sub(lambda found: f"Qz{self.special.index(found[0])}zQ", value)
        if isinstance(value, Mapping):
            return {self._marked(key): self._marked(item) for key, item in value.items()}
        return [self._marked(item) for item in value] if isinstance(value, Sequence) else value

    def _spelled(self, marked: str) -> str:
        return _MARK.sub(lambda found: self.special[int(found[1])], marked)


@cache
def _only_letters(serialized: str, first: bool) -> Tokenizer:
    """The same tokenizer, to which special tokens are letters; for the first piece of a text or for others."""
    described = json.loads(serialized)
    if not first and (described["pre_tokenizer"] or {}).get("prepend_scheme") == "first":
        described["pre_tokenizer"]["prepend_scheme"] = "never"
    copy = Tokenizer.from_str(json.dumps(described))
    copy.encode_special_tokens = True
    return copy


def _common(first: str, second: str) -> str:
    length = next((at for at, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    return first[:length]


def _leaves(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value if isinstance(value, str) else _json(value)]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _with_text_arguments(message: Turn) -> Turn:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
