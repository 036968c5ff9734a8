"""Rows from files, folders and the Hub: a dictionary each, and where it stands. `formats` says what they mean."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from topwork.common.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Row:
    """One row as it was read. `source` names it for people: `train.jsonl:17` (line), `train.json[17]` (index)."""

    fields: dict[str, Any]
    source: str


def read_rows(name: str, max_rows: int | None = None) -> list[Row]:
    """The rows of a file, of a folder's files in the order of their names, or of a Hub data set.

    A folder is not searched deeper than one level; its .txt files count only where it holds nothing else, because
    a README or a licence beside the data is no data. Raises DataError for whatever cannot be read whole.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        rows = [row for file in _folder_files(path) for row in islice(_file_rows(file), max_rows)][:max_rows]
    elif path.exists():
        rows = list(islice(_file_rows(path), max_rows))
    elif _HUB_ID.fullmatch(name) and path.suffix.lower() not in READERS:
        rows = _hub_rows(name, max_rows)
    else:
        raise DataError(_missing(path))
    if not rows:
        raise DataError(f"{name} holds no rows; expected at least one (is the file empty?)")
    return rows


def _file_rows(path: Path) -> Iterator[Row]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} ends in {path.suffix or 'nothing'!r}, which is no known kind of data file; "
            f"expected one of {', '.join(sorted(READERS))}"
        )
    return reader(path)


def _folder_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in READERS)
    chosen = [file for file in files if file.suffix.lower() != ".txt"] or files
    if not chosen:
        raise DataError(f"the folder {folder} holds no data file; expected some of {', '.join(sorted(READERS))}")
    return chosen


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does its folder {path.parent}; check the path (it starts at {Path.cwd()})"
    names = [entry.name for entry in path.parent.iterdir()]
    hint = did_you_mean(path.name, names)
    return f"{path} does not exist{hint or '; expected a data file, a folder of them, or a Hub id owner/name'}"


# Text files


def _decoded(path: Path) -> str:
    """The file as text: UTF-8, with or without a byte order mark. Raises DataError naming byte, line and a guess."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise DataError(_wrong_encoding(path, data, offset)) from error
    if "\0" in text:
        raise DataError(_wrong_encoding(path, data, data.index(b"\0")))
    if not text.strip():
        raise DataError(f"{path} is empty; expected at least one row")
    return text


def _wrong_encoding(path: Path, data: bytes, offset: int) -> str:
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:1000]
    likely = "utf-16" if utf16 else "cp1252"
    line = data.count(b"\n", 0, offset) + 1
    near = data[max(0, offset - 12) : offset + 12].decode("latin-1") if likely == "cp1252" else ""
    shown = f" (near {near!r})" if near else ""
    return (
        f"{path} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset:,}, line {line:,}{shown}. It is likely "
        f"{likely}; convert it: iconv -f {likely} -t utf-8 {path.name} > utf8-{path.name}"
    )


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(_bad_json(path, number, line, error)) from error
        if not isinstance(value, dict):
            hint = "; a file that is one JSON list ends in .json" if isinstance(value, list) else ""
            raise DataError(
                f"{path}, line {number:,}: expected one JSON object per line, found "
                f"{type(value).__name__} {_shown(line)}{hint}"
            )
        yield Row(value, f"{path.name}:{number}")


def _bad_json(path: Path, number: int, line: str, error: ValueError) -> str:
    column = getattr(error, "colno", 1)
    reason = getattr(error, "msg", str(error))
    hint = "; a file that is one JSON list ends in .json" if number == 1 and line.strip() in ("[", "{") else ""
    return f"{path}, line {number:,}, column {column}: malformed JSON ({reason}) at {_shown(line, column - 1)}{hint}"


def _shown(text: str, at: int = 0, width: int = 60) -> str:
    start = max(0, at - width // 3)
    piece = text[start : start + width]
    return repr(("…" if start else "") + piece + ("…" if start + width < len(text) else ""))


def _json(path: Path) -> Iterator[Row]:
    text = _decoded(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _jsonl(path)  # one object per line under the name .json: common, and unmistakable
            return
        line = text.split("\n")[error.lineno - 1]
        raise DataError(_bad_json(path, error.lineno, line, error)) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: malformed JSON ({error})") from error
    for index, item in enumerate(_only_list(path, value)):
        if not isinstance(item, dict):
            raise DataError(f"{path}[{index}]: expected an object, found {type(item).__name__} {_shown(repr(item))}")
        yield Row(item, f"{path.name}[{index}]")


def _only_list(path: Path, value: object) -> list[Any]:
    """The list itself, or the one list that an object holds."""
    if isinstance(value, list):
        return value
    lists = {key: item for key, item in value.items() if isinstance(item, list)} if isinstance(value, dict) else {}
    rows = {key: item for key, item in lists.items() if item and isinstance(item[0], dict)}
    if len(rows) == 1:
        return next(iter(rows.values()))
    found = f"an object with {len(rows)} lists of rows" if isinstance(value, dict) else type(value).__name__
    raise DataError(f"{path}: expected a list of objects, or an object that holds one such list; found {found}")


def _csv(path: Path) -> Iterator[Row]:
    text = _decoded(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(text)
    records = _records(path, text, delimiter)
    _, header = next(records)
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the header names {', '.join(map(repr, twice))} twice; expected one name per column")
    for line, cells in records:
        if len(cells) != len(header):
            raise DataError(
                f"{path}, line {line:,}: {len(cells)} cells where the header has {len(header)} "
                f"({', '.join(header)}; separator {delimiter!r}): {_shown(delimiter.join(cells))}. "
                "A cell that holds the separator or a line break must stand in double quotes"
            )
        yield Row(dict(zip(header, cells)), f"{path.name}:{line}")


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line on which the record starts, its cells); blank lines are passed over."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line:,}: malformed CSV ({error}); check the double quotes there") from error


def _delimiter(text: str) -> str:
    """The separator that cuts the first records into the most cells, the same number in each."""

    def score(delimiter: str) -> tuple[bool, int]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            widths = [len(cells) for cells in islice(reader, 20) if cells]
        except csv.Error:
            return False, 0
        return len(set(widths)) == 1 and widths[0] > 1, widths[0] if widths else 0

    return max(",;\t|", key=score)


def _txt(path: Path) -> Iterator[Row]:
    """Documents separated by blank lines."""
    block: list[str] = []
    for number, line in enumerate([*_decoded(path).replace("\r\n", "\n").split("\n"), ""], 1):
        if line.strip():
            block.append(line)
        elif block:
            yield Row({"text": "\n".join(block)}, f"{path.name}:{number - len(block)}")
            block = []


# Tables and the Hub


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        index = 0
        for batch in table.iter_batches():
            for fields in batch.to_pylist():
                yield Row(fields, f"{path.name}[{index}]")
                index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+){0,2}")


def _hub_rows(name: str, max_rows: int | None) -> list[Row]:
    repository, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    part = (split or "train") + (f"[:{max_rows}]" if max_rows else "")
    from datasets import load_dataset

    try:
        table = load_dataset(repository, config or None, split=part)
    except Exception as error:  # the library raises whatever its network, cache and builders raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name} is no local file or folder, and loading it from the Hub failed ({type(error).__name__}: {reason})"
            ". Expected an existing path, or owner/name[:config[:split]] and a network connection"
        ) from error
    return [Row(dict(fields), f"{name}[{index}]") for index, fields in enumerate(table)]


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}
