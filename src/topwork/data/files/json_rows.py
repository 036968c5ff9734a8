"""Rows of .jsonl and .json files, in every shape that programs write them in."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from topwork.common.errors import DataError, did_you_mean
from topwork.common.yaml_text import in_yaml
from topwork.data.files.decoding import DataFile, read_lines, read_text

Found = Iterator[tuple[dict[str, Any], str]]
"""A row's fields, and where in its file it stands: `:17` (line) or `[17]` (index, from 0)."""
_WHOLE = re.compile(r"\d+\Z")
_SPLITS = ("test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev")


def _finite(number: str) -> float | None:
    value = float(number)
    return value if math.isfinite(value) else None


class SaidTwice(DataError):
    """An object gives one key two values, of which a reader would lose one."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next((key for key, value in pairs if found[key] != value), None)
        if twice is not None:
            raise SaidTwice(f"an object has the key {twice!r} twice, with different values; give each its own name")
    return found


DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=lambda _: None, object_pairs_hook=_once)
"""NaN and Infinity, which pandas writes where a table holds nothing, are no value."""


def jsonl_rows(file: DataFile) -> Found:
    """One object a line. Objects over several lines, and a file that is one list, are read too.

    Raises DataError naming line and column.
    """
    lines = read_lines(file)
    for number, line in enumerate(lines, 1):
        text = line.removesuffix("\n").removesuffix("\r").lstrip("\ufeff")  # files put together keep their marks
        if not text.strip():
            continue
        try:
            value = DECODER.decode(text)
        except SaidTwice as error:
            raise DataError(f"{file.path}, line {number:,}: {error}") from error
        except RecursionError as error:
            raise DataError(_too_deep(file, number)) from error
        except ValueError as error:
            if text.strip().startswith(("{", "[")) and _goes_on(text, error):
                yield from _over_lines(file, number, "".join([line, *lines]), error)
                return
            raise DataError(_bad_json(file, number, text, error)) from error
        if isinstance(value, list) and number == 1 and not any(rest.strip() for rest in lines):
            yield from _list_rows(file, value)
            return
        yield _object(file, value, number), f":{number}"


def _object(file: DataFile, value: object, number: int) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise DataError(
        f"{file.path}, line {number:,}: expected one JSON object per line, found {type(value).__name__} "
        f"{_shown(json.dumps(value, ensure_ascii=False))}{_list_hint(value)}"
    )


def _list_hint(value: object) -> str:
    if not isinstance(value, list):
        return ""
    if value and isinstance(value[0], dict):
        return '; a list of messages goes into an object: {"messages": [...]}'
    return '; an object names what it holds: {"prompt": ..., "completion": ...}'


def _goes_on(text: str, error: ValueError) -> bool:
    """Whether the line ends before its value does."""
    return getattr(error, "pos", 0) >= len(text.rstrip()) and "control character" not in str(error)


def _over_lines(file: DataFile, first: int, text: str, cause: ValueError) -> Found:
    """The values from line `first` on, each over as many lines as it takes; the file's only list is its rows."""
    found = _values(file, first, text, cause)
    value, line = next(found)
    if isinstance(value, list) and first == 1:
        after = next(found, None)
        if after is not None:
            raise DataError(f"{file.path}, line {after[1]:,}: expected nothing after the list that begins the file")
        yield from _list_rows(file, value)
        return
    file.note("its objects stand over several lines each")
    yield _object(file, value, line), f":{line}"
    for value, line in found:
        yield _object(file, value, line), f":{line}"


def _values(file: DataFile, first: int, text: str, cause: ValueError) -> Iterator[tuple[Any, int]]:
    """Every JSON value of a text that begins on line `first`, with the line on which it begins."""
    space = re.compile(r"\s*")
    at, line, counted = 0, first, 0
    while True:
        start = space.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing at all too
        line += text.count("\n", counted, start)
        counted = start
        if start == len(text):
            return
        try:
            value, at = DECODER.raw_decode(text, start)
        except RecursionError as error:
            raise DataError(_too_deep(file, line)) from error
        except json.JSONDecodeError as error:
            if start == 0 and text[:1] == "{" and "\n" in text:  # a single line that is broken: tell of that line
                whole = text.split("\n", 1)[0]
                following = text[len(whole) + 1 :].lstrip()
                if following.startswith("{"):
                    raise DataError(_bad_json(file, line, whole, cause)) from error
            at_line = first + error.lineno - 1
            bad = text.split("\n")[error.lineno - 1]
            before = text[: error.pos]
            raise DataError(_bad_json(file, at_line, bad, error, before)) from error
        yield value, line


def _too_deep(file: DataFile, number: int) -> str:
    return (
        f"{file.path}, line {number:,}: its JSON is nested deeper than any data is ({'{'} in {'{'} in {'{'} …, about "
        "1,000 levels can be read); flatten it, or leave that row out"
    )


def _bad_json(file: DataFile, number: int, line: str, error: ValueError, before: str | None = None) -> str:
    column = getattr(error, "colno", 1)
    reason = getattr(error, "msg", str(error))
    before = line[: column - 1] if before is None else before
    hint = _json_hint(line[column - 1 :], before, line, reason)
    return (
        f"{file.path}, line {number:,}, column {column}: malformed JSON ({reason}) at {_shown(line, column - 1)}{hint}"
    )


def _json_hint(rest: str, before: str, line: str, reason: str) -> str:
    """What people often have in place of JSON."""
    word = re.match(r"(None|True|False|nan|undefined)\b", rest)
    if rest.startswith("'") or word or line.lstrip().startswith(("{'", "[{'")):
        found = word.group(1) if word else "'"
        return (
            f"; {found} is Python's or JavaScript's way to write it: write rows with json.dumps, not with str or print"
        )
    if before.rstrip().endswith(",") and rest[:1] in ("}", "]"):
        return f"; JSON has no comma before {rest[0]}"
    if rest.startswith(("//", "/*", "#")):
        return "; JSON has no comments"
    if rest.startswith(",") and before.rstrip().endswith("}"):
        return "; a line holds one object and no comma after it, or all of them stand in one [ ]"
    if reason.startswith("Expecting ','") and rest.strip():
        return "; a comma is missing before it"
    if rest.startswith("{") and before.rstrip().endswith("}"):
        return "; every object stands on a line of its own"
    if reason.startswith("Unterminated string"):
        return r"; a line break in a text is written \n, and a file that ends there was cut off"
    if reason.startswith("Invalid control character"):
        return r"; a tab or a line break in a text is written \t or \n"
    if rest[:1] in ("“", "”", "‘", "’"):
        return '; JSON has straight quotes: "'
    return ""


def _shown(text: str, at: int = 0, width: int = 60) -> str:
    start = max(0, at - width // 3)
    piece = text[start : start + width]
    return repr(("…" if start else "") + piece + ("…" if start + width < len(text) else ""))


# One JSON value for a whole file


def json_rows(file: DataFile) -> Found:
    """A list of objects; an object that holds it, or columns in place of rows; or one object a line after all."""
    text = read_text(file)
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{") and text[error.pos] == "{":
            yield from jsonl_rows(DataFile(file.path, file.name, file.encoding, notes=file.notes))
            return
        line = text.split("\n")[error.lineno - 1]
        raise DataError(_bad_json(file, error.lineno, line, error, text[: error.pos])) from error
    except SaidTwice as error:
        raise DataError(f"{file.path}: {error}") from error
    except RecursionError as error:
        raise DataError(_too_deep(file, 1)) from error
    except ValueError as error:
        raise DataError(f"{file.path}: malformed JSON ({error})") from error
    if file.split is not None and not isinstance(value, dict):
        raise DataError(f"{file.path} has no list {file.split!r}; it is one {type(value).__name__}: leave split out")
    if isinstance(value, dict):
        value = _rows_of_object(file, value)
    if not isinstance(value, list):
        found = f"{type(value).__name__} {_shown(text.strip())}"
        raise DataError(
            f"{file.path}: expected a list of objects, or an object that holds one such list; found {found}"
        )
    yield from _list_rows(file, value)


def _list_rows(file: DataFile, rows: Sequence[Any]) -> Found:
    for index, item in enumerate(rows):
        if not isinstance(item, dict):
            found = f"{type(item).__name__} {_shown(json.dumps(item, ensure_ascii=False))}{_list_hint(item)}"
            raise DataError(f"{file.path}[{index}]: expected an object, found {found}")
        yield item, f"[{index}]"


def _rows_of_object(file: DataFile, value: dict[str, Any]) -> list[Any]:
    """The rows that an object holds: its only list of them, or columns as pandas writes them. Raises DataError."""
    if file.split is not None:
        return _named_list(file, value)
    if {"columns", "data"} <= set(value) and _is_table(value["columns"], value["data"]):
        return [dict(zip(value["columns"], cells)) for cells in value["data"]]
    lists = {key: item for key, item in value.items() if isinstance(item, list)}
    rows = {key: item for key, item in lists.items() if item and isinstance(item[0], dict)}
    if any(map(_is_conversation, rows.values())):
        return [value]  # what one row holds
    if len(rows) > 1:
        raise DataError(
            f"{file.path}: expected a list of objects, or an object that holds one such list; found an object with "
            f"{len(rows)} lists of rows ({', '.join(rows)}); name one: "
            + in_yaml({"path": str(file.path), "split": next(iter(rows))})
        )
    lengths = {len(item) for item in lists.values()}
    if lists and len(lists) == len(value) and len(lengths) == 1 and len(rows) < len(lists):
        return [dict(zip(value, cells)) for cells in zip(*value.values())]
    if rows:
        name, found = next(iter(rows.items()))
        if name.lower() in _SPLITS:
            file.note(f"its list {name!r} is read")
        return found
    if value and all(isinstance(item, dict) for item in value.values()):
        return _of_labels(file, value)
    return [value]


def _named_list(file: DataFile, value: dict[str, Any]) -> list[Any]:
    rows = value.get(file.split or "")
    if not isinstance(rows, list):
        raise DataError(
            f"{file.path} has no list {file.split!r}{did_you_mean(str(file.split), value)}; it holds {', '.join(value)}"
        )
    return rows


def _is_table(columns: object, cells: object) -> bool:
    return (
        isinstance(columns, list)
        and isinstance(cells, list)
        and all(isinstance(row, list) and len(row) == len(columns) for row in cells)
    )


def _is_conversation(items: list[Any]) -> bool:
    """Whether they are messages, or tools, which one row holds, and not rows."""
    return any(keys <= set(items[0]) for keys in ({"role", "content"}, {"from", "value"}, {"type", "function"}))


def _of_labels(file: DataFile, value: dict[str, dict[str, Any]]) -> list[Any]:
    """{column: {label: cell}} or {label: row}, by which of both keys are numbers. Raises DataError."""
    inner = [list(item) for item in value.values()]
    by_column = all(_WHOLE.match(key) for keys in inner for key in keys) and any(inner)
    if by_column:
        labels = list(dict.fromkeys(key for keys in inner for key in keys))
        return [{name: cells.get(label) for name, cells in value.items()} for label in labels]
    if all(_WHOLE.match(key) for key in value):
        return list(value.values())
    if len(value) > 1 and all(set(keys) == set(inner[0]) for keys in inner):
        raise DataError(
            f"{file.path}: an object of objects ({', '.join(list(value)[:3])} …, each with {', '.join(inner[0][:3])}) "
            "may be rows by their ids or columns; write a list of objects: [{...}, {...}]"
        )
    return [value]
