"""What `data.columns` may say of a field: a column's name, a path into a column, or a template over columns.

`answers.text[0]` is a path. A value with braces is a template: "{title}\\n{answers.text[0]} {notes?}". `{name?}` may
have no value, and then takes the white space before it along; `{{` and `}}` are braces.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from topwork.common.errors import DataError
from topwork.data.meaning.values import RowProblem, is_blank, parsed, text_of

_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_PLAIN = re.compile(r"[A-Za-z_][\w-]*")
_NOT_TEXT = ("y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "nan")  # what YAML reads otherwise


@dataclass(frozen=True)
class Named:
    """A place in a row: a column, and steps into it (keys and numbers)."""

    written: str
    column: str
    steps: tuple[str | int, ...] = ()
    optional: bool = False


@dataclass(frozen=True)
class Template:
    """Literal text and places, in turn."""

    pieces: tuple[str | Named, ...]

    @property
    def named(self) -> tuple[Named, ...]:
        """The places alone."""
        return tuple(piece for piece in self.pieces if isinstance(piece, Named))


@lru_cache(maxsize=1024)
def template_of(spec: str) -> Template:
    """A value of `data.columns` that is no column's name, read. Raises DataError where its braces do not pair up."""
    if "{" not in spec and "}" not in spec:
        return Template((_named(spec),))
    pieces: list[str | Named] = []
    end = 0
    for found in _PIECE.finditer(spec):
        pieces.append(spec[end : found.start()])
        end = found.end()
        if found[0] in ("{{", "}}"):
            pieces.append(found[0][0])
        elif found[1] is None or not found[1].strip(" ?"):
            raise DataError(
                f"data.columns has the template {spec!r}, whose {found[0]!r} at character {found.start()} names no "
                "column; {name} is a column, {name?} one that may be empty, and {{ and }} are braces"
            )
        else:
            pieces.append(_named(found[1]))
    pieces.append(spec[end:])
    return Template(tuple(piece for piece in pieces if piece != ""))


@lru_cache(maxsize=1024)
def _named(written: str) -> Named:
    optional = written.endswith("?")
    path = written.removesuffix("?")
    first = _STEP.search(path)
    start = first.start() if first else len(path)
    steps: list[str | int] = []
    at = start
    while at < len(path):
        step = _STEP.match(path, at)
        if step is None:
            return Named(path, path, (), optional)
        steps.append(step[1] if step[1] is not None else int(step[2]))
        at = step.end()
    return Named(path, path[:start], tuple(steps), optional)


def columns_of(spec: str, known: Mapping[str, Any]) -> list[str]:
    """The columns that a value of `data.columns` reads; those of `known` under the name that they have there."""
    if spec in known:
        return [spec]
    return list(dict.fromkeys(actual(named, known) for named in template_of(spec).named))


def actual(named: Named, known: Mapping[str, Any]) -> str:
    """The column that a place is in: it may have dots in its own name, or white space around it."""
    for name in (named.written, named.column):
        if name in known:
            return name
    return next((name for name in known if str(name).strip() in (named.written, named.column)), named.column)


def value_of(fields: Mapping[str, Any], spec: str) -> Any:
    """The value of a field in a row: as it is where a column or a path is named, and a text where a template is; None
    where the row has no such column. Raises RowProblem where a place of a template has no value."""
    if spec in fields:
        return fields[spec]
    template = template_of(spec)
    if len(template.pieces) == 1 and template.named:
        return _at(fields, template.named[0])
    text = ""
    swallow = False  # an empty place at the head takes the white space after it along
    for piece in template.pieces:
        if isinstance(piece, str):
            text += piece.lstrip() if swallow else piece
            swallow = False
            continue
        value = _at(fields, piece)
        if not is_blank(value):
            text += text_of(value, piece.written)
        elif piece.optional:
            text = text.rstrip()
            swallow = not text
        else:
            raise RowProblem(f"{piece.written} has no value; write {{{piece.written}?}} where it may have none")
    return text


def _at(fields: Mapping[str, Any], named: Named) -> Any:
    if named.written in fields:
        return fields[named.written]
    value = fields.get(named.column)
    if value is None and named.column not in fields:
        value = fields.get(actual(named, fields))
    for step in named.steps:
        value = parsed(value)
        if isinstance(step, int):
            alone = step == 0 and isinstance(value, str | int | float)  # of rows with one value, and rows with a list
            value = value if alone else value[step] if isinstance(value, list | tuple) and step < len(value) else None
        elif isinstance(value, Mapping):
            value = value.get(step)
        else:
            return None
    return value


def in_yaml(mapping: Mapping[str, str]) -> str:
    """A mapping as one may paste it into a recipe."""
    return "{" + ", ".join(f"{quoted(key)}: {quoted(value)}" for key, value in mapping.items()) + "}"


def quoted(text: str) -> str:
    """A text as one may paste it into a recipe."""
    plain = _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT
    return text if plain else json.dumps(text, ensure_ascii=False)
