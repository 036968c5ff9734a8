"""What columns the rows have: all of them, from all rows, in one quick pass that can be fed rows as they come."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from topwork.data.conversations import CONTENT_KEYS, OURS, ROLE_KEYS, Spelling, first_of
from topwork.data.files.rows import Row
from topwork.data.meaning.fields import plain
from topwork.data.meaning.values import is_blank, is_nothing, parsed

_SAMPLE = 50  # the first rows, kept
_MORE = 250  # rows kept because they show something new, at most
_SHAPES = 2000  # sets of columns that are told apart, at most
_DISTINCT = 64  # values that are told apart, at most


@dataclass
class Column:
    """One column: `rows` in which it stands, `filled` of them with a value, the first of these, its values.

    kinds     by kind the number of rows: text, opens (text that begins as a list or object), number, bool, messages (by
              the key that says who speaks), parts, texts (a list of them), list, object, or the type's name
    letters   of all its texts together; `words` counts the texts with a space in them
    distinct  its first different texts and numbers
    """

    name: str
    rows: int = 0
    filled: int = 0
    first: str = ""
    kinds: dict[str, int] = field(default_factory=dict)
    letters: int = 0
    words: int = 0
    distinct: set[object] = field(default_factory=set)

    def add(self, value: object, kind: str, source: str) -> None:
        """One more row's value, which is not blank."""
        if not self.filled:
            self.first = source
        self.filled += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if isinstance(value, str):
            self.letters += len(value)
            self.words += " " in value
        if len(self.distinct) < _DISTINCT and isinstance(value, str | int | float):
            self.distinct.add(value)

    @property
    def is_text(self) -> bool:
        """Whether all its values are texts."""
        return bool(self.kinds) and self.kinds.keys() <= {"text", "opens"}

    @property
    def is_plain(self) -> bool:
        """Whether all its values are texts, numbers or the like, which have one reading as text."""
        return bool(self.kinds) and self.kinds.keys() <= {"text", "opens", "number", "bool", "parts"}


@dataclass
class Shape:
    """Rows that have values in the same columns: how many, and the first of them."""

    count: int
    first: Row


@dataclass
class Columns:
    """What all rows of a source have. Feed it with `add`, in their order.

    sample  the first rows, and such as show something new
    """

    count: int = 0
    by_name: dict[str, Column] = field(default_factory=dict)
    shapes: dict[tuple[str, ...], Shape] = field(default_factory=dict)
    sample: list[Row] = field(default_factory=list)

    @classmethod
    def survey(cls, rows: Iterable[Row]) -> "Columns":
        """The columns of all these rows."""
        found = cls()
        for row in rows:
            found.add(row)
        return found

    def add(self, row: Row) -> None:
        """One more row."""
        self.count += 1
        new = self.count <= _SAMPLE
        filled = []
        for name, value in row.fields.items():
            column = self.by_name.get(name)
            if column is None:
                column = self.by_name[name] = Column(name)
            column.rows += 1
            kind = kind_of(value)
            if kind is None:
                continue
            new = new or kind not in column.kinds
            column.add(value, kind, row.source)
            filled.append(name)
        key = tuple(filled)
        shape = self.shapes.get(key)
        if shape is not None:
            shape.count += 1
        elif len(self.shapes) < _SHAPES:
            self.shapes[key] = Shape(1, row)
            new = True
        if new and len(self.sample) < _SAMPLE + _MORE:
            self.sample.append(row)

    @property
    def names(self) -> list[str]:
        """Of all columns, in the order of their first appearance."""
        return list(self.by_name)

    def filled(self, name: str) -> int:
        """In how many rows a column has a value."""
        column = self.by_name.get(name)
        return column.filled if column else 0

    def share(self, name: str) -> str:
        """'in 8 of 60 rows', or nothing for a column that has a value in all rows, or in none."""
        number = self.by_name[name].filled or self.by_name[name].rows
        return "" if number == self.count else f"in {number:,} of {self.count:,} rows"

    def listed(self, limit: int = 30) -> str:
        """The names for people."""
        names = [str(name) for name in self.by_name]
        return ", ".join(names[:limit]) + (f", … ({len(names):,} in all)" if len(names) > limit else "")


def kind_of(value: object) -> str | None:
    """What a value is, in a word of `Column.kinds`; None where it is blank."""
    if isinstance(value, str):
        if not value or value.isspace():
            return None
        return "opens" if value.lstrip()[:1] in ("[", "{") else "text"
    if value is None or is_nothing(value) or is_blank(value):
        return None
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, Mapping):
        return "object"
    return _kind_of_list(value) if isinstance(value, list) else type(value).__name__


def _kind_of_list(items: list[Any]) -> str:
    if isinstance(items[0], Mapping):
        keys = speaks(items)
        if keys:
            return f"messages {keys[0]}"
        return "parts" if "text" in items[0] or "type" in items[0] else "list"
    return "texts" if all(isinstance(item, str) for item in items) else "list"


def speaks(value: object, spelling: Spelling = OURS) -> tuple[str, str] | None:
    """(the key that says who speaks, the key of what is said) in a list of messages, or that as text, as `plain` has
    them; else None."""
    items = parsed(value)
    first = parsed(items[0]) if isinstance(items, list) and items else None
    if not isinstance(first, Mapping):
        return None
    first = spelling.renamed(first) if spelling.keys else first
    role = first_of(first, ROLE_KEYS)
    if role is None or not isinstance(first[role], str):
        return None
    content = first_of(first, CONTENT_KEYS)
    calls = any(key in first for key in ("tool_calls", "function_call"))
    return (plain(role), plain(content or "content")) if content or calls else None
