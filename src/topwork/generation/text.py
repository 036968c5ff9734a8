"""Tokens to text as they come: never half a character, never the beginning of a stop string."""

from collections.abc import Collection, Sequence
from typing import Any


class TextStream:
    """The text of one answer, token by token: what `add` and `finish` return, put together, is what the tokenizer makes
    of all tokens without the special ones, up to the first stop string.

    include_stop  whether the stop string itself is part of the text
    shown         special tokens that are text all the same
    """

    stopped: str | None
    """The stop string that was met; nothing is told after it."""

    def __init__(
        self, tokenizer: Any, stop_strings: Sequence[str] = (), include_stop: bool = False, shown: Collection[int] = ()
    ) -> None:
        raise NotImplementedError

    def add(self, token: int) -> str:
        """What may be shown now."""
        raise NotImplementedError

    def finish(self) -> str:
        """The answer is at its end: what was held back."""
        raise NotImplementedError


def token_text(tokenizer: Any, token: int) -> str:
    """What one token says on its own, special ones included: U+FFFD for parts of characters."""
    raise NotImplementedError


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes that one token stands for."""
    raise NotImplementedError
