"""Tokens to text as they come: never half a character, never the beginning of a stop string."""

import codecs
import json
import re
import weakref
from collections.abc import Collection, Sequence
from functools import cache, cached_property
from typing import Any, Protocol

from topwork.common.errors import RequestError


class TextStream:
    """The text of one answer, token by token: what `add` and `finish` return, put together, is what the tokenizer makes
    of all tokens without the special ones, up to the first stop string. A token costs the same at any length.

    stop_strings  of several the one that is complete first; of those complete at one letter the longest
    include_stop  whether the stop string itself is part of the text
    shown         special tokens that are text all the same
    after         tokens of a text that this one goes on with: some tokenizers leave out the space at a text's head
    """

    stopped: str | None
    """The stop string that was met; nothing is told after it."""

    def __init__(
        self, tokenizer: Any, stop_strings: Sequence[str] = (), include_stop: bool = False,
        shown: Collection[int] = (), after: Sequence[int] = (),
    ) -> None:  # fmt: skip
        if not all(stop_strings):
            raise RequestError("a stop string is empty, which would stop every answer at once; leave it out")
        self.stopped = None
        self._stops, self._include_stop = tuple(stop_strings), include_stop
        self._tokenizer, pieces = tokenizer, pieces_of(tokenizer)
        self._decoder: _Decoder = _Bytes(pieces, shown) if pieces.byte_level else _Window(pieces, shown, after)
        self._held = ""

    def add(self, token: int) -> str:
        """What may be shown now."""
        return "" if self.stopped is not None else self._shown(self._decoder.add(token))

    def finish(self) -> str:
        """The answer is at its end: what was held back."""
        if self.stopped is not None:
            return ""
        text = self._shown(self._decoder.finish())
        text, self._held = text + self._held, ""
        return text

    def _shown(self, new: str) -> str:
        text = self._held + new
        if not self._stops or not new:
            return new if not self._stops else ""
        found = [(text.find(stop), stop) for stop in self._stops]
        met = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if met:
            end, start, self.stopped = min(met)
            self._held = ""
            return text[: end if self._include_stop else start]
        beginning = max(_beginning(text, stop) for stop in self._stops)
        self._held = text[len(text) - beginning :]
        return text[: len(text) - beginning]


def _beginning(text: str, stop: str) -> int:
    """How many letters at the text's end are the beginning of the stop string."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def token_text(tokenizer: Any, token: int) -> str:
    """What one token says amid others, special ones included: U+FFFD for parts of characters."""
    return token_bytes(tokenizer, token).decode("utf-8", "replace")


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes that one token stands for; none for an id that the tokenizer does not have."""
    return pieces_of(tokenizer).bytes_of(token)


class Pieces:
    """What each token of a tokenizer stands for; made once for a tokenizer (`pieces_of`)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = weakref.proxy(tokenizer)  # else it would be kept for ever, by what is kept for it
        self.byte_level = _decoder_types(tokenizer) == ["ByteLevel"]
        named = set(tokenizer.all_special_ids)
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = frozenset(named | added)
        self.name, self.bytes_of, self.is_byte = cache(self._name), cache(self._bytes_of), cache(self._is_byte)

    @cached_property
    def names(self) -> dict[str, int]:
        """Text -> id of the special tokens."""
        return {name: token for token in self.special if (name := self.name(token)) is not None}

    def decode(self, tokens: Sequence[int]) -> str:
        """Their text, special ones included."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _name(self, token: int) -> str | None:
        if token < 0:  # transformers would count from the end
            return None
        name = self._tokenizer.convert_ids_to_tokens(int(token))
        return None if name is None else str(name)

    def _bytes_of(self, token: int) -> bytes:
        name = self.name(token)
        if name is None:
            return b""
        if self.byte_level:
            letters = _byte_letters()
            if all(letter in letters for letter in name):
                return bytes(letters[letter] for letter in name)
            return name.encode()  # an added token, written as it is
        if token in self.special:
            return name.encode()
        if self.is_byte(token):
            return bytes([int(name[3:5], 16)])
        return self.decode([self._anchor, token])[len(self.decode([self._anchor])) :].encode()

    def _is_byte(self, token: int) -> bool:
        """Whether a token is one byte, which says nothing until the bytes beside it are there."""
        return _BYTE.fullmatch(self.name(token) or "") is not None

    @property
    def _anchor(self) -> int:
        """A token to stand before another, since the first one's space is left out."""
        return int(self._tokenizer("a", add_special_tokens=False)["input_ids"][-1])


_BYTE = re.compile("<0x[0-9a-fA-F]{2}>")
_known: "weakref.WeakKeyDictionary[Any, Pieces]" = weakref.WeakKeyDictionary()


def pieces_of(tokenizer: Any) -> Pieces:
    """The tokenizer's pieces, made at the first call."""
    if tokenizer not in _known:
        _known[tokenizer] = Pieces(tokenizer)
    return _known[tokenizer]


def _decoder_types(tokenizer: Any) -> list[str]:
    """The kinds of a fast tokenizer's decoders, in their order."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return [each["type"] for each in (state["decoders"] if state["type"] == "Sequence" else [state])]


@cache
def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for those from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class _Decoder(Protocol):
    def add(self, token: int) -> str: ...

    def finish(self) -> str: ...


class _Bytes:
    """Byte-level tokens: their bytes, through a decoder that waits for whole characters."""

    def __init__(self, pieces: Pieces, shown: Collection[int]) -> None:
        self._pieces, self._skipped = pieces, pieces.special - frozenset(shown)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return "" if token in self._skipped else self._utf8.decode(self._pieces.bytes_of(token))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Window:
    """Any other tokens: what a token adds to the text of the one before it.

    A token that is one byte waits for one that is not: whether a row of bytes is text or none is known at its end.
    """

    def __init__(self, pieces: Pieces, shown: Collection[int], after: Sequence[int]) -> None:
        self._pieces, self._skipped = pieces, pieces.special - frozenset(shown)
        self._tokens = [token for token in after if token not in self._skipped][-_CONTEXT:]
        self._told = pieces.decode(self._tokens)

    def add(self, token: int) -> str:
        if token in self._skipped or self._pieces.name(token) is None:
            return ""
        self._tokens.append(token)
        return "" if self._pieces.is_byte(token) else self._new()

    def finish(self) -> str:
        return self._new()

    def _new(self) -> str:
        new = self._pieces.decode(self._tokens)[len(self._told) :]
        if new:
            self._tokens = self._tokens[-1:]
            self._told = self._pieces.decode(self._tokens)
        return new


_CONTEXT = 16
"""Tokens of the text before that are looked at."""
