"""How rows lie in a file of text, so that each can be found by its place and read alone."""

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from topwork.common.errors import DataError
from topwork.data.config import DataConfig
from topwork.data.rows import Row, _bad_json, _delimiter, _shown

_PIECE = 1 << 22
_HEAD = 1 << 20  # bytes in which the separator of a table is looked for
_LONGEST_OBJECT = 1 << 28  # letters of one row in a .json list
_LARGEST_DOCUMENT = 1 << 26  # bytes of a text file that is one row


@dataclass(frozen=True)
class Layout:
    """How rows lie in a file.

    bounds  (file) -> where each row begins, and its number for people; what follows a row up to the next is white space
    row     (bytes of a row, its number) -> the row
    """

    bounds: Callable[[BinaryIO], Iterator[tuple[int, int]]]
    row: Callable[[bytes, int], Row]


def layout_of(path: Path, config: DataConfig) -> Layout:
    """Raises DataError for a kind of file, or an encoding, in which rows cannot be found by their place."""
    made = LAYOUTS.get(path.suffix.lower())
    if made is None:
        raise DataError(
            f"{path} ends in {path.suffix or 'nothing'!r}, which cannot be streamed; expected one of "
            f"{', '.join(sorted(LAYOUTS))}, or leave data.streaming out"
        )
    encoding = encoding_of(config)
    try:
        plain = '\n",[{}]:'.encode(encoding) == b'\n",[{}]:'
    except LookupError as error:
        raise DataError(f"data.encoding is {encoding!r}, which is no encoding that Python knows") from error
    if not plain or encoding.lower().replace("_", "-").startswith(("iso2022", "iso-2022", "hz", "utf-7")):
        raise DataError(
            f"{path} is {encoding}, in which the bytes of a line break do not stand for one alone, so its rows cannot "
            f"be found by their place; convert it: iconv -f {encoding} -t utf-8 {path.name} > utf8-{path.name}"
        )
    return made(path, config)


def encoding_of(config: DataConfig) -> str:
    """Of text files."""
    return config.encoding or "utf-8"


def _text(path: Path, raw: bytes, line: int, encoding: str) -> str:
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {line + raw.count(10, 0, error.start):,} is not {encoding}: byte 0x{raw[error.start]:02x} "
            f"(near {raw[max(0, error.start - 12) : error.start + 12].decode('latin-1')!r}). Set data.encoding to what "
            "it is, or convert the file to UTF-8"
        ) from error
    return text.removeprefix("\ufeff")


def _lines(file: BinaryIO) -> Iterator[tuple[int, int]]:
    at = 0
    for number, line in enumerate(file, 1):
        if not (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).isspace():
            yield at, number
        at += len(line)


def _paragraphs(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Blocks between blank lines."""
    at, inside = 0, False
    for number, line in enumerate(file, 1):
        blank = line.isspace()
        if not blank and not inside:
            yield at, number
        inside = not blank
        at += len(line)


def _whole(file: BinaryIO) -> Iterator[tuple[int, int]]:
    if any(not piece.isspace() for piece in iter(partial(file.read, _PIECE), b"")):
        yield 0, 1


def _jsonl(path: Path, config: DataConfig) -> Layout:
    encoding = encoding_of(config)

    def row(raw: bytes, line: int) -> Row:
        text = _text(path, raw, line, encoding).rstrip("\r\n")
        try:
            value = json.loads(text)
        except ValueError as error:
            raise DataError(_bad_json(path, line, text, error)) from error
        if not isinstance(value, dict):
            hint = "; a file that is one JSON list ends in .json" if isinstance(value, list) else ""
            raise DataError(
                f"{path}, line {line:,}: expected one JSON object per line, found {type(value).__name__} "
                f"{_shown(text)}{hint}"
            )
        return Row(value, f"{path.name}:{line}")

    return Layout(_lines, row)


def _documents(path: Path, config: DataConfig) -> Layout:
    encoding = encoding_of(config)
    if config.documents == "file" and path.stat().st_size > _LARGEST_DOCUMENT:
        raise DataError(
            f"{path} has {path.stat().st_size:,} bytes and data.documents is file, so that it is a single row; set "
            "data.documents: paragraph or line to stream it"
        )

    def row(raw: bytes, line: int) -> Row:
        lines = _text(path, raw, line, encoding).replace("\r\n", "\n").split("\n")
        while not lines[-1].strip():
            lines.pop()
        return Row({"text": "\n".join(lines)}, f"{path.name}:{line}")

    return Layout({"file": _whole, "paragraph": _paragraphs, "line": _lines}[config.documents], row)


def _json(path: Path, config: DataConfig) -> Layout:
    encoding = encoding_of(config)
    with open(path, "rb") as file:
        head = file.read(_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"{"):
        return _jsonl(path, config)  # one object per line under the name .json

    def row(raw: bytes, index: int) -> Row:
        value, _ = json.JSONDecoder().raw_decode(_text(path, raw, 1, encoding).lstrip())
        if not isinstance(value, dict):
            raise DataError(f"{path}[{index}]: expected an object, found {type(value).__name__} {_shown(repr(value))}")
        return Row(value, f"{path.name}[{index}]")

    return Layout(partial(_elements, path=path, encoding=encoding), row)


def _elements(file: BinaryIO, path: Path, encoding: str) -> Iterator[tuple[int, int]]:
    """The elements of one JSON list, found without holding it."""
    window = _Window(file, encoding)
    if not window.skip(" \t\r\n\ufeff") or window.text[0] != "[":
        raise DataError(f"{path}: expected a list of objects, found {_shown(window.text)}")
    window.place, index = 1, 0
    parse = json.JSONDecoder().raw_decode
    while window.skip(" \t\r\n,"):
        if window.text[window.place] == "]":
            return
        try:
            _, stop = parse(window.text, window.place)
            whole = stop < len(window.text) or not window.more()
        except ValueError as error:
            whole = False
            if len(window.text) - window.place > _LONGEST_OBJECT or not window.more():
                at = _shown(window.text, window.place)
                raise DataError(f"{path}[{index}]: malformed JSON ({error}) at {at}") from error
        if whole:
            yield window.offset(), index
            window.place, index = stop, index + 1
    raise DataError(f"{path}: malformed JSON (the list does not end); is the file whole?")


class _Window:
    """A piece of a file as text, a place in it, and how many bytes of the file stand before that place."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self.file, self.encoding = file, encoding
        self.decoder = codecs.getincrementaldecoder(encoding)()
        self.text, self.place = "", 0
        self._known = 0, 0  # a place, and the bytes before it

    def more(self) -> bool:
        """Read on, and forget what stands before the place; False at the end. The place stays, and is then 0."""
        piece = self.file.read(_PIECE)
        if piece:
            self._known = 0, self.offset()
            self.text, self.place = self.text[self.place :] + self.decoder.decode(piece), 0
        return bool(piece)

    def skip(self, letters: str) -> bool:
        """Go on to the next that is none of these letters; False where there is none."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in letters:
                self.place += 1
            if self.place < len(self.text):
                return True
            if not self.more():
                return False

    def offset(self) -> int:
        place, before = self._known
        self._known = self.place, before + len(self.text[place : self.place].encode(self.encoding))
        return self._known[1]


def _csv(path: Path, config: DataConfig) -> Layout:
    encoding = encoding_of(config)
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    cut = head if len(head) < _HEAD else head[: head.rfind(b"\n") + 1]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(_text(path, cut, 1, encoding))
    records = partial(_records, path=path, encoding=encoding, delimiter=delimiter)
    with open(path, "rb") as file:
        header = next(records(file), (0, 1, list[str]()))[2]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}: the header names {', '.join(map(repr, twice))} twice; expected one name per column")

    def bounds(file: BinaryIO) -> Iterator[tuple[int, int]]:
        found = records(file)
        next(found, None)
        for start, line, cells in found:
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {line:,}: {len(cells)} cells where the header has {len(header)} "
                    f"({', '.join(header)}; separator {delimiter!r}): {_shown(delimiter.join(cells))}. "
                    "A cell that holds the separator or a line break must stand in double quotes"
                )
            yield start, line

    def row(raw: bytes, line: int) -> Row:
        pieces = _text(path, raw, line, encoding).splitlines(keepends=True)
        cells = next(csv.reader(pieces, delimiter=delimiter, strict=True))
        return Row(dict(zip(header, cells)), f"{path.name}:{line}")

    return Layout(bounds, row)


def _records(file: BinaryIO, path: Path, encoding: str, delimiter: str) -> Iterator[tuple[int, int, list[str]]]:
    """(where the record begins, its line, its cells): Python's own reader takes lines until a record is whole."""
    at, line, taken = 0, 1, [0, 0]

    def lines() -> Iterator[str]:
        for raw in file:
            taken[0] += len(raw)
            taken[1] += 1
            yield _text(path, raw, taken[1], encoding)

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if cells:
                yield at, line, cells
            at, line = taken[0], taken[1] + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line:,}: malformed CSV ({error}); check the double quotes there") from error


LAYOUTS: dict[str, Callable[[Path, DataConfig], Layout]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".txt": _documents,
}
