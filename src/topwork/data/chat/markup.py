"""Where markup ends and content begins: token ids of a rendered text in which a row's own letters never are markup.

A chat template writes special tokens around what people say, and people say `</s>` and `<|im_end|>` too: in questions
about chat templates, in HTML, in attacks. Before a row is rendered, each special token that its own strings spell gets
a mark behind its first letter. What is whole after rendering is the template's, and becomes the token; what is marked
loses its mark and becomes its letters, in their right surroundings, by a copy of the tokenizer that knows the special
tokens by other names. Rows that spell none, nearly all, cost one search.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from secrets import token_hex
from typing import Any

from topwork.common.errors import DataError

_MARK = "\ue0b5"  # of the private use area; where a row has it itself, it stands twice
_END = 8
"""Tokens at a text's end among which what ends it stands, white space behind it."""
_IN_ANSWERS = re.compile(
    r"</?(think|thinking|thought|reasoning|answer|tool_(call|response)s?)>|</?\|?think\|?>|<\|/?think\|>|\[/?THINK\]"
    r"|<\|(begin|end)_of_(thought|solution)\|>"
)
"""Tokens that belong into what is said, whoever flagged them: a model writes them, and no turn begins or ends there."""


class Tokens:
    """A tokenizer's special tokens, and rendered text as ids.

    special  text -> id of all tokens that no ordinary text becomes
    control  those of them that are markup: flagged special, named (BOS, EOS, PAD ...), or written by the chat template
             around messages
    """

    def __init__(self, tokenizer: Any, written: str = "") -> None:
        """`written`: what the chat template writes around a plain conversation."""
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
        known = {**{token.content: index for index, token in added.items()}, **named}
        self.special: dict[str, int] = {text: index for text, index in known.items() if text.strip()}
        self._cut_at = _any_of(self.special)
        around = {piece for piece in self.pieces(written) if piece in self.special}
        flagged = {token.content for token in added.values() if token.special} | set(named)
        self.control: dict[str, int] = {
            text: index
            for text, index in self.special.items()
            if text in flagged | around and len(text) > 1 and not _IN_ANSWERS.fullmatch(text)
        }
        self._markup = _any_of(self.control)
        self._spelled = re.compile(f"{_MARK}|{self._markup.pattern}")
        self._breaks = re.compile(f"(?s)(?={self._markup.pattern})(.)")
        plain = {token.content for token in added.values() if not token.normalized and not token.single_word}
        self._joints = [
            text
            for text in around & plain
            if getattr(tokenizer, "is_fast", False)
            and not any(text in other for other in self.special if other != text)
        ]

    # Marks

    def spells(self, text: str) -> bool:
        """Whether a row's own text spells markup."""
        return self._spelled.search(text) is not None

    def marked(self, value: Any) -> Any:
        """The value with the markup broken that its strings spell, keys of objects among them."""
        if isinstance(value, str):
            return self._broken(value) if self.spells(value) else value
        if isinstance(value, Mapping):
            return {self.marked(key): self.marked(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(each) for each in value]
        return value

    def unmarked(self, text: str) -> str:
        """The text as people wrote it."""
        return _unmarked(text)

    def _broken(self, text: str) -> str:
        return self._breaks.sub(rf"\2{_MARK}", text.replace(_MARK, _MARK * 2))

    # Cutting

    def pieces(self, text: str) -> list[str]:
        """The text cut at special tokens, these included."""
        return [piece for piece in self._cut_at.split(text) if piece]

    def said(self, text: str) -> str:
        """The text without its markup, whose letters are nobody's words."""
        return self._markup.sub("\0", text)

    def ends_turn(self, text: str) -> bool:
        """Whether the text ends in markup, by which generation can stop."""
        return any(text.endswith(each) for each in self.control)

    def check_ended(self, ids: Sequence[int], text: str) -> None:
        """Raises DataError where the end of a text is markup, and its ids are letters: some tokenizers look for special
        tokens in normalized text, and miss them behind other letters."""
        if not self._marks.isdisjoint(ids[-_END:]):
            return
        end = next((each for each in self.control if text.rstrip().endswith(each)), "")
        raise DataError(
            f"the tokenizer reads {end!r}, by which the chat template ends a turn, as letters, so the model could not "
            "learn to stop; set normalized: false for this token in the base's tokenizer.json, or a data.chat_template "
            "that ends turns otherwise"
        )

    @cached_property
    def _marks(self) -> frozenset[int]:
        return frozenset(self.control.values())

    def joint(self, text: str) -> int:
        """Where the text's last token stands at which it can be cut and tokenized apart; -1 where there is none.

        What follows such a token is tokenized without regard to what precedes it.
        """
        return max((text.rfind(each) for each in self._joints), default=-1)

    def never_join(self) -> None:
        """Every text is tokenized whole from now on."""
        self._joints = []

    # Ids

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts. Nothing is added: the template writes the BOS itself where there is one."""
        plain = iter(self._plain([text for text in texts if _MARK not in text]))
        marked = iter(self._of_marked([text for text in texts if _MARK in text]))
        return [next(marked if _MARK in text else plain) for text in texts]

    def document(self, text: str, letters: bool) -> str:
        """A text as `ids` takes it that is no markup at all, whatever it spells, or else brings its own."""
        if letters:
            return self._broken(text) if self.spells(text) else text
        return text.replace(_MARK, _MARK * 2)

    def with_places(self, text: str, letters: bool) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Token ids of a document, and where in the text each begins and ends, its white space included; None where
        the tokenizer cannot tell."""
        if self._backend is None:
            return None
        encoded = (self._renamed if letters else self._bare).encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        backend = self._backend
        if backend is not None and not (backend.truncation or backend.padding or backend.encode_special_tokens):
            return [each.ids for each in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        return list(self._asked(list(texts), add_special_tokens=False)["input_ids"])

    def _of_marked(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts or self._backend is None:
            return list(map(self._of_pieces, texts))
        names = self._names
        renamed = [_unmarked(self._markup.sub(lambda found: names[found[0]], text)) for text in texts]
        return [each.ids for each in self._renamed.encode_batch_fast(renamed, add_special_tokens=False)]

    def _of_pieces(self, text: str) -> list[int]:
        """For tokenizers of which no copy can be made: piece by piece between markup."""
        ids: list[int] = []
        for piece in self._markup.split(text):
            if piece in self.control:
                ids.append(self.control[piece])
            elif piece:
                asked = {"add_special_tokens": False, "split_special_tokens": True}
                ids += self._asked([_unmarked(piece)], **asked)["input_ids"][0]
        return ids

    def _asked(self, texts: list[str], **how: bool) -> Mapping[str, list[list[int]]]:
        found: Mapping[str, list[list[int]]] = self.tokenizer(texts, return_attention_mask=False, verbose=False, **how)
        return found

    def ids_after(self, text: str) -> list[int]:
        """The ids of a text that continues another, without the space that some tokenizers put at a text's head."""
        for anchor in ("\n", ":", self.tokenizer.eos_token or ""):
            whole, head = self.ids([anchor + text, anchor]) if anchor else (self.ids([text])[0], [])
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self.ids([text])[0]

    @cached_property
    def _backend(self) -> Any:
        return self.tokenizer.backend_tokenizer if getattr(self.tokenizer, "is_fast", False) else None

    @cached_property
    def _names(self) -> dict[str, str]:
        """What the copy calls markup: names that nobody can know, so nobody can spell."""
        secret = token_hex(12)
        return {text: f"<{secret}{number}>" for number, text in enumerate(self.control)}

    def _described(self) -> dict[str, Any]:
        """The tokenizer as its file has it, without what it adds or cuts off."""
        description: dict[str, Any] = json.loads(self._backend.to_str())
        return description | {"truncation": None, "padding": None, "post_processor": None}

    @cached_property
    def _bare(self) -> Any:
        """The tokenizer without what it adds or cuts off."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(json.dumps(self._described()))

    @cached_property
    def _renamed(self) -> Any:
        """The same, with markup under other names."""
        from tokenizers import Tokenizer

        description, names = self._described(), self._names
        for token in description["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = description["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
        elif model.get("vocab"):
            model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        if model.get("merges"):  # none may lead where letters do not go
            model["merges"] = [pair for pair in model["merges"] if _merged(pair) not in names]
        if model.get("unk_token"):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        return Tokenizer.from_str(json.dumps(description))


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    """Any of the texts, the longest first; one group."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(texts, key=len, reverse=True)))})" if texts else "((?!))")


def _merged(pair: str | Sequence[str]) -> str:
    return pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair)


def _unmarked(text: str) -> str:
    return re.sub(f"{_MARK}({_MARK}?)", r"\1", text)
