"""What a cell means: the text that a value stands for, what counts as no value, and objects that were written as text.

Files hold more than text: numbers, dates, objects, lists of parts, and lists or objects that somebody wrote into a
column of text. Each has one reading, and it is here.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from datetime import date, time
from decimal import Decimal
from math import isfinite
from types import MappingProxyType
from typing import Any

from topwork.common.yaml_text import in_yaml


class RowProblem(Exception):
    """Why the row at hand cannot be used; the readers turn it into a BadRow."""


def is_nothing(value: object) -> bool:
    """Whether a cell holds no value: None, and the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and value != value)


def is_blank(value: object) -> bool:
    """Whether a cell holds nothing that could be read: no value, white space, an empty list or object."""
    if isinstance(value, str):
        return not value or value.isspace()
    return is_nothing(value) or (isinstance(value, list | dict | tuple) and not value)


def kind(value: object) -> str:
    """A value's type for people, after 'is'."""
    return "missing" if is_nothing(value) else f"of type {type(value).__name__}"


def text_of(value: object, name: str, field: str = "", mapped: Mapping[str, str] = MappingProxyType({})) -> str:
    """The text that a value stands for. Raises RowProblem, which calls the value `name`, where it stands for none.

    field   the field that data.columns may map to a part of `name`
    mapped  what data.columns says now

    A number is its shortest text (3, 0.1, 3.0), true and false are those words, a date is ISO's, an object is JSON on
    one line, and OpenAI's and LLaMA-Factory's text parts are put together as they are. Several texts are not: nobody
    has said what stands between them.
    """
    if isinstance(value, str):
        return _whole(value, name)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if isfinite(value):
            return repr(value)
        raise RowProblem(f"{name} is {'missing' if value != value else value}, expected text")
    if isinstance(value, list | tuple):
        return _text_of_list(value, name, field, mapped)
    if isinstance(value, Mapping):
        return _part_text(value, name) if value.get("type") == "text" and "text" in value else written(value, name)
    return _text_of_other(value, name, field, mapped)


def _whole(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowProblem(f"{name} holds half a surrogate pair at character {error.start}, which is no text") from error
    return text


def _text_of_other(value: object, name: str, field: str = "", mapped: Mapping[str, str] = MappingProxyType({})) -> str:
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowProblem(f"{name} is bytes that are no UTF-8, expected text") from error
    plain = _plain(value)
    if plain is value:
        raise RowProblem(f"{name} is {kind(value)}, expected text")
    return text_of(plain, name, field, mapped)


def _plain(value: object) -> object:
    """NumPy's scalars and arrays as Python's own; everything else as it is."""
    change = getattr(value, "tolist", None)
    return change() if callable(change) else value


def _text_of_list(
    items: list[Any] | tuple[Any, ...], name: str, field: str, mapped: Mapping[str, str]
) -> str:  # fmt: skip
    if any(isinstance(item, Mapping) and ("text" in item or "type" in item) for item in items):
        return "".join(_part_text(part, name) for part in items)
    if any(isinstance(item, Mapping | list | tuple) for item in items):
        return written(items, name)
    if len(items) == 1:
        return text_of(items[0], name, field, mapped)
    if not items:
        raise RowProblem(f"{name} is an empty list, expected text")
    raise RowProblem(
        f"{name} is a list of {len(items)} texts, and joined they would be one that nobody wrote; "
        f"{_how_to_choose(name, field, mapped)}"
    )


_ONE_PLACE = re.compile(r"\{?([^{}?]+)(\??)\}?")


def _how_to_choose(name: str, field: str, mapped: Mapping[str, str]) -> str:
    """What a recipe may say of a column that holds several texts."""
    place = _ONE_PLACE.fullmatch(name)
    if place is None or not (field or " " not in name):
        return "write them as one"
    first, second = (f"{{{place[1]}[{number}]{place[2]}}}" for number in (0, 1))
    if not field:
        return f"in a template, choose one, as {first}, or say what stands between them, as {first}, {second}"
    one, both = (f"data.columns: {in_yaml({**mapped, field: way})}" for way in (first, f"{first}, {second}"))
    return f"choose one with {one}, or say what stands between them, as {both}"


def _part_text(part: object, name: str) -> str:
    if isinstance(part, str):
        return _whole(part, name)
    if not isinstance(part, Mapping):
        raise RowProblem(f"{name} has a part that is {kind(part)}, expected {{type: text, text: …}}")
    if part.get("type") not in (None, "text"):
        raise RowProblem(f"{name} has a part of type {part['type']!r}; only text can be learned")
    text = part.get("text") if part.get("text") is not None else part.get("value")
    if isinstance(text, list | Mapping):
        raise RowProblem(f"a text part of {name} is {kind(text)}, expected text")
    return text_of(text, f"a text part of {name}")


def written(value: object, name: str) -> str:
    """A value as JSON on one line. Raises RowProblem where it cannot be written so."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=lambda inner: _inner(inner, name))
    except RecursionError as error:
        raise RowProblem(f"{name} is nested too deep to be written as text") from error
    except (TypeError, ValueError) as error:
        raise RowProblem(f"{name} cannot be written as JSON ({error})") from error
    return _whole(text, name)


def _inner(value: object, name: str) -> object:
    plain = _plain(value)
    return plain if plain is not value else _text_of_other(value, f"a value in {name}")


# Objects that were written as text

_MARKS = re.compile(
    r"(?P<quoted>'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\")|(?P<next>\}\s+\{)|(?P<array>\barray\()"
    r"|(?P<end>,\s*dtype=\w+\))",
    re.DOTALL,
)


def parsed(value: object) -> Any:
    """A text that is a JSON object or list, or how Python or NumPy prints one, as that; all else as it is."""
    if not isinstance(value, str) or not opens(value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    printed = _literal(value)
    if printed is None:
        printed = _literal(_MARKS.sub(_as_python, value))
    return value if printed is None else printed


def opens(text: str) -> bool:
    """Whether a text begins as a list or an object does."""
    return text[:1] in ("[", "{") or (text[:1].isspace() and text.lstrip()[:1] in ("[", "{"))


def _literal(text: str) -> Any:
    """What Python prints so; None where it prints nothing so."""
    try:
        with warnings.catch_warnings():  # Python warns of escapes that it does not know, which are other people's text
            warnings.simplefilter("ignore")
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _as_python(found: re.Match[str]) -> str:
    """NumPy writes no comma between the objects of an array, and names the array inside of objects."""
    if found["quoted"]:
        return found["quoted"]
    return "}, {" if found["next"] else ""
