"""What `data.columns` may say of a field: a column's name, a path into a column, or a template over columns.

A name is the column's as it stands, else one that differs from it in capital letters and white space alone.
`answers.text[0]` is a path. A value with braces is a template: "{title}\\n{answers.text[0]} {notes?}". `{name?}` may
have no value, and then takes the white space before it along; `{{` and `}}` are braces.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from topwork.common.errors import DataError
from topwork.data.meaning.fields import called
from topwork.data.meaning.values import RowProblem, is_blank, parsed, text_of

_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


Steps = tuple[str | int, ...]


@dataclass(frozen=True)
class Named:
    """A place in a row, as it is written, and its readings as a column and steps into it (keys and numbers): a column
    may have dots and brackets in its own name, so the longest is first."""

    written: str
    readings: tuple[tuple[str, Steps], ...]
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
    steps: list[tuple[int, str | int]] = []
    at = first.start() if first else len(path)
    while at < len(path):
        step = _STEP.match(path, at)
        if step is None:
            return Named(path, ((path, ()),), optional)
        steps.append((at, step[1] if step[1] is not None else int(step[2])))
        at = step.end()
    starts = [*(start for start, _ in steps), len(path)]
    readings = [(path[:start], tuple(step for _, step in steps[number:])) for number, start in enumerate(starts)]
    return Named(path, tuple(reversed(readings)), optional)


def columns_of(spec: str, known: Mapping[str, Any]) -> list[str]:
    """The columns that a value of `data.columns` reads; those of `known` under the name that they have there."""
    if spec in known:
        return [spec]
    return list(dict.fromkeys(_place(named, known)[0] for named in template_of(spec).named))


def likenesses(spec: str, known: Collection[str]) -> list[str]:
    """Columns of which a value of `data.columns` may mean either, since none is written exactly so."""
    if spec in known:
        return []
    for named in template_of(spec).named:
        alike = next((found for column, _ in named.readings if (found := called(column, known))), [])
        if len(alike) > 1:
            return alike
    return []


def under_own_names(mapped: Mapping[str, str], known: Mapping[str, Any]) -> dict[str, str]:
    """`data.columns` with each column that is named alone under the name that it has in `known`, where one is meant."""
    alike = {field: called(spec, known) for field, spec in mapped.items()}
    return {field: alike[field][0] if len(alike[field]) == 1 else spec for field, spec in mapped.items()}


def _place(named: Named, known: Mapping[str, Any]) -> tuple[str, Steps]:
    """The column of `known` that a place is in, and the steps into it."""
    for reading in named.readings:
        if reading[0] in known:
            return reading
    for column, steps in named.readings:
        alike = called(column, known)
        if alike:
            return alike[0], steps
    return named.readings[-1]


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
    column, steps = _place(named, fields)
    value = fields.get(column)
    for step in steps:
        value = parsed(value)
        if isinstance(step, int):
            alone = step == 0 and isinstance(value, str | int | float)  # of rows with one value, and rows with a list
            value = value if alone else value[step] if isinstance(value, list | tuple) and step < len(value) else None
        elif isinstance(value, Mapping):
            value = value.get(step)
        else:
            return None
    return value
