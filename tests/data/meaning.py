"""Rows in the hand, and what is made of them."""

from typing import Any

from topwork.data.config import DataConfig
from topwork.data.conversations import Conversation
from topwork.data.files.rows import Row
from topwork.data.meaning.formats import Format, read_conversations, recognise
from topwork.data.summary import refuse_bad

U: dict[str, Any] = {"role": "user", "content": "q"}
A: dict[str, Any] = {"role": "assistant", "content": "a"}


def rows_of(*fields: dict[str, Any]) -> list[Row]:
    """As of a file a.jsonl."""
    return [Row(item, f"a.jsonl:{number}") for number, item in enumerate(fields, 1)]


def load(*fields: dict[str, Any], **config: Any) -> tuple[Format, list[Conversation]]:
    """What the rows were recognised as, and read; bad rows are refused as the recipe says."""
    made = DataConfig(train="a.jsonl", **config)
    rows = rows_of(*fields)
    format = recognise(rows, made)
    good, bad = read_conversations(rows, format, made)
    refuse_bad(bad, len(rows), made)
    return format, good


def read(*fields: dict[str, Any], **config: Any) -> list[Conversation]:
    """The conversations alone."""
    return load(*fields, **config)[1]


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    """Who says what."""
    return [(message.role, message.content) for message in conversation.messages]


def learned(conversation: Conversation) -> list[str]:
    """The answers of which something is learned."""
    return [turn.content for turn in conversation.messages if turn.role == "assistant" and turn.weight != 0]
