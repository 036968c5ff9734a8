"""What the rules look at: a recipe's rows as they were read and as tokens, the tokenizer, the template, the adapter."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np

from topwork.data.chat.template import ChatTemplate
from topwork.data.conversations import BadRow, Conversation, Message
from topwork.recipe.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Sequences:
    """The tokens of many sequences, end to end. N tokens, S sequences.

    tokens   [N] int32
    weights  [N] float32, with which each is learned
    bounds   [S + 1] int64: sequence i is tokens[bounds[i] : bounds[i + 1]]
    rows     [S] int32: the number of the conversation that each comes from
    """

    tokens: np.ndarray
    weights: np.ndarray
    bounds: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[S] tokens of each."""
        return np.diff(self.bounds)

    @cached_property
    def learned(self) -> np.ndarray:
        """[N] bool: whether a token is learned."""
        return self.weights > 0

    def per_sequence(self, values: np.ndarray) -> np.ndarray:
        """[S] how many of `values` [N] bool are true in each sequence."""
        return np.diff(np.searchsorted(np.flatnonzero(values), self.bounds))

    def among(self, ids: Iterable[int]) -> np.ndarray:
        """[N] bool: whether a token is one of a few."""
        found = np.zeros(len(self.tokens), bool)
        for each in ids:
            found |= self.tokens == each
        return found


EMPTY = Sequences(
    np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(1, np.int64), np.zeros(0, np.int32)
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Side:
    """Rows that are read together: what is learned (`train`), what validates (`eval`), what is scored (`test`).

    named      what the recipe calls them
    rows       how many were read
    bad        those that cannot be used, and why
    sequences  of the conversations, before any is cut to length
    """

    name: str
    named: str
    rows: int
    conversations: Sequence[Conversation]
    bad: Sequence[BadRow] = ()
    sequences: Sequences = EMPTY
    formats: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    """What reading says of the files: which were read, what was noticed in them."""
    notes: Sequence[tuple[str, str]] = ()
    """(source, what of the row was left out or changed on the way)"""

    @cached_property
    def prompts(self) -> list[bytes]:
        """Of each conversation, a fingerprint of what stands before the last answer."""
        return [
            _fingerprint(messages_before(row)) if row.kind == "chat" else _text_key(row) for row in self.conversations
        ]

    @cached_property
    def asked(self) -> list[bytes]:
        """Of each conversation, a fingerprint of what is asked, whatever its case and the system message."""
        return [
            _fingerprint(messages_before(row), True) if row.kind == "chat" else _text_key(row)
            for row in self.conversations
        ]

    @cached_property
    def wholes(self) -> list[bytes]:
        """Of each conversation, a fingerprint of all of it."""
        return [_fingerprint(row.messages) if row.kind == "chat" else _text_key(row) for row in self.conversations]

    def sources(self, rows: Sequence[int] | np.ndarray) -> tuple[str, ...]:
        """What conversations are called, in their order, each once."""
        return tuple(self.conversations[row].source for row in sorted({int(row) for row in rows}))

    def texts(self) -> Iterator[tuple[Conversation, str, str]]:
        """(row, role, text) of every message that says something; the role of a document is `text`."""
        for row in self.conversations:
            if row.kind == "text":
                yield row, "text", row.text or ""
            for message in row.messages:
                if message.content:
                    yield row, message.role, message.content


@dataclass(frozen=True)
class Facts:
    """What a tokenizer says of itself. `special` are the tokens that no ordinary text becomes, text -> id."""

    bos: int | None
    eos: int | None
    pad: int | None
    adds_bos: bool
    ends: frozenset[int]
    special: dict[str, int]
    own_template: str | None


@dataclass(frozen=True, eq=False)
class Examined:
    """All that the rules may ask. `limit` is the longest sequence that is learned whole, in tokens.

    trainable  parameters that the adapter trains; None where that could not be counted
    refused    why the template cannot render these rows at all; then there are no sequences
    only_first how many rows of a larger set were read; None for all of them
    """

    recipe: Recipe
    tokenizer: Any
    facts: Facts
    template: ChatTemplate
    context_length: int
    limit: int
    train: Side
    eval: Side | None = None
    test: Side | None = None
    trainable: int | None = None
    refused: str | None = None
    only_first: int | None = None

    @property
    def sides(self) -> list[Side]:
        """Those that there are."""
        return [side for side in (self.train, self.eval, self.test) if side is not None]

    @property
    def total(self) -> int:
        """Rows of all sides."""
        return sum(side.rows for side in self.sides)


def messages_before(row: Conversation) -> Sequence[Message]:
    """The messages before the last answer."""
    return row.messages[: _last_answer(row)]


def answer_of(row: Conversation) -> str:
    """The text of the last answer; empty where there is none."""
    at = _last_answer(row)
    return row.messages[at].content if at < len(row.messages) else ""


def _last_answer(row: Conversation) -> int:
    return next(
        (at for at in range(len(row.messages) - 1, -1, -1) if row.messages[at].role == "assistant"), len(row.messages)
    )


def squeezed(text: str) -> str:
    """Without the white space that nobody sees: what people call the same text."""
    return " ".join(text.split())


def _fingerprint(messages: Sequence[Message], asked: bool = False) -> bytes:
    digest = blake2b(digest_size=12)
    for message in messages:
        if asked and message.role == "system":
            continue
        calls = message.extra.get("tool_calls")
        told = json.dumps(calls, sort_keys=True, default=str) if calls else ""
        text = squeezed(message.content)
        digest.update(
            f"\x1e{message.role}\x1f{text.casefold() if asked else text}\x1f{told}".encode("utf-8", "replace")
        )
    return digest.digest()


def _text_key(row: Conversation) -> bytes:
    return blake2b(squeezed(row.text or "").encode("utf-8", "replace"), digest_size=12).digest()
