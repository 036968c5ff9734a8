"""Files in which rows are found by their place, as they are: JSON in UTF-8, an object a line or one list of objects."""

import codecs
import json
import os
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

from topwork.data.files.decoding import DataFile, packing
from topwork.data.files.json_rows import DECODER
from topwork.data.files.places import kind_of
from topwork.data.files.rows import Row
from topwork.data.streaming.index import FileRows, Index

_PIECE = 1 << 22  # bytes of a list that are read at a time
_LONGEST_OBJECT = 1 << 28  # letters


class NotPlain(Exception):
    """The file is not of this kind, or something in it is wrong: the ordinary readers tell what."""


def plain_rows(file: DataFile, limit: int | None, name: str) -> FileRows | None:
    """The first `limit` rows of a file, or all, each of which was read once to see that it can be; None where it is not
    of this kind throughout. Rows are named after `name`."""
    if packing(file.path) or kind_of(file.path) not in (".jsonl", ".ndjson", ".json"):
        return None
    with open(file.path, "rb") as opened:
        head = opened.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
    as_list = head.startswith(b"[") and kind_of(file.path) == ".json" and file.split is None
    scan, row = (_elements, _element) if as_list else (_lines, _line)
    try:
        with open(file.path, "rb") as opened:
            index = _index(opened, scan(opened), limit)
    except (NotPlain, ValueError, RecursionError):
        return None
    if not len(index) or (len(index) == 1 and not as_list and kind_of(file.path) == ".json"):
        return None  # an object alone may hold the rows
    return FileRows(file.path, index, partial(row, name))


def _index(file: BinaryIO, found: Iterator[tuple[int, int]], limit: int | None) -> Index:
    index = Index()
    end = os.fstat(file.fileno()).st_size
    for start, number in found:
        if len(index) == limit:
            end = start
            break
        index.add(start, number)
    index.close(end)
    return index


# An object a line


def _lines(file: BinaryIO) -> Iterator[tuple[int, int]]:
    at = 0
    for number, line in enumerate(file, 1):
        if number == 1:
            skipped = len(line) - len(line.removeprefix(codecs.BOM_UTF8))
            at, line = skipped, line[skipped:]
        if not line.isspace() and line:
            _object(line)
            yield at, number
        at += len(line)


def _object(raw: bytes) -> dict[str, Any]:
    if b"\0" in raw:
        raise NotPlain
    value = DECODER.decode(raw.decode("utf-8"))
    if not isinstance(value, dict):
        raise NotPlain
    return value


def _line(name: str, raw: bytes, number: int) -> Row:
    return Row(_object(raw), f"{name}:{number}")


# One list of objects


def _elements(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Where the list's elements begin; no more than a piece of the file and the longest element are held."""
    window = _Window(file)
    if not window.skip(" \t\r\n\ufeff") or window.text[0] != "[":
        raise NotPlain
    window.place, index = 1, 0
    while window.skip(" \t\r\n,"):
        if window.text[window.place] == "]":
            window.place += 1
            if window.skip(" \t\r\n"):
                raise NotPlain
            return
        try:
            value, stop = DECODER.raw_decode(window.text, window.place)
            whole = stop < len(window.text) or not window.more()
        except json.JSONDecodeError:
            whole, value = False, {}
            if len(window.text) - window.place > _LONGEST_OBJECT or not window.more():
                raise
        if not isinstance(value, dict):
            raise NotPlain
        if whole:
            yield window.offset(), index
            window.place, index = stop, index + 1
    raise NotPlain  # it does not end


def _element(name: str, raw: bytes, index: int) -> Row:
    return Row(DECODER.raw_decode(raw.decode("utf-8"))[0], f"{name}[{index}]")


class _Window:
    """A piece of a file as text, a place in it, and how many bytes of the file stand before that place."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.decoder = file, codecs.getincrementaldecoder("utf-8")()
        self.text, self.place = "", 0
        self._known = 0, 0  # a place, and the bytes before it

    def more(self) -> bool:
        """Read on, and forget what stands before the place, which then is 0; False at the end."""
        piece = self.file.read(_PIECE)
        if piece:
            before = self.offset()
            self.text, self.place, self._known = self.text[self.place :] + self.decoder.decode(piece), 0, (0, before)
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
        """Bytes before the place."""
        place, before = self._known
        self._known = self.place, before + len(self.text[place : self.place].encode())
        return self._known[1]
