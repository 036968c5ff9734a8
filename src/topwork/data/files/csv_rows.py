"""Rows of .csv and .tsv files, as spreadsheets, pandas and people write them."""

import csv
import re
import sys
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from topwork.common.errors import DataError
from topwork.data.files.decoding import DataFile, read_lines, unpacked_name

Found = Iterator[tuple[dict[str, Any], str]]
_SNIFFED_LINES = 200
_LONGEST_CELL = min(sys.maxsize, 2**31 - 1)
_SEPARATOR = re.compile(r"sep=(.)\r?\n")
_LONGEST_NAME = 80  # a longer header cell is a sentence


_WIDE = "，；、؛،"
"""Commas and semicolons of other scripts, which separate nothing in a CSV."""


def csv_rows(file: DataFile) -> Found:
    """Rows under a header of column names. Cells are text as it stands; a blank one is empty text.

    Columns that a spreadsheet left without a name and without a cell are passed over. Raises DataError naming the line.
    """
    csv.field_size_limit(_LONGEST_CELL)
    lines = read_lines(file, newline="")
    first = list(islice(lines, _SNIFFED_LINES))
    said = _SEPARATOR.match(first[0]) if first else None
    tab = unpacked_name(file.path).suffix.lower() == ".tsv"
    delimiter = said.group(1) if said else "\t" if tab else _delimiter(first)
    spaced = _spaced(first, delimiter)
    if spaced:
        file.note("the spaces after its separators are left out")
    if said:
        first[0] = "\n"  # Excel's own line; a blank one keeps the others' numbers
    quotes: Any = csv.QUOTE_NONE if tab and _has_no_quoting(first) else csv.QUOTE_MINIMAL
    reader = csv.reader(chain(first, lines), delimiter=delimiter, strict=True, skipinitialspace=spaced, quoting=quotes)
    records = _records(file, reader)
    _, cells = next(records, (0, []))
    header = [name.strip() for name in cells]
    check_header(file, header)
    width = max((number for number, name in enumerate(header, 1) if name), default=0)
    for line, cells in records:
        if not any(cells) and len(header) > 1:
            continue  # a spreadsheet's rows that nobody filled
        yield _fields(file, header, width, line, cells, delimiter), f":{line}"


def _fields(
    file: DataFile, header: list[str], width: int, line: int, cells: list[str], delimiter: str
) -> dict[str, Any]:
    if len(cells) < width or any(cells[len(header) :]):
        raise DataError(
            f"{file.path}, line {line:,}: {len(cells)} cells where the header has {len(header)} "
            f"({', '.join(header)}; separator {delimiter!r}): {shown(delimiter.join(cells))}. "
            "A cell that holds the separator or a line break must stand in double quotes"
        )
    unnamed = next((at for at, name in enumerate(header) if at and not name and cells[at : at + 1] > [""]), 0)
    if unnamed:  # the first may be pandas' numbers of the rows
        raise DataError(
            f"{file.path}, line {line:,}: {shown(cells[unnamed])} stands in column {unnamed + 1}, which has no "
            "name in the header; name it there, or take the column out"
        )
    return {name: cell for name, cell in zip(header, cells) if name}


def check_header(file: DataFile, header: list[str]) -> None:
    """Raises DataError where the first row cannot be names, and notes where it may be a row."""
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise DataError(
            f"{file.path}: the header names {', '.join(map(repr, twice))} twice; expected one name per column"
        )
    wide = next((each for each in _WIDE if len(header) == 1 and each in header[0]), None)
    if wide:
        raise DataError(
            f"{file.path}: its first line, {shown(header[0])}, is one name; if {wide!r} parts several, write , or ; "
            "or a tab in its place, in all rows"
        )
    if not any(header):
        raise DataError(f"{file.path}: its first line names no column; expected names such as prompt, completion")
    if not header[0]:
        file.note("its first column, which has no name, is not read")
    if any(map(_is_no_name, header)):
        file.note(
            f"its first line is taken for the names of the columns ({shown(', '.join(header))}) and not learned; if "
            "it is a row, put a line of names before it"
        )


def _is_no_name(cell: str) -> bool:
    """Whether a header's cell reads as a row's would: a number, a sentence."""
    if not cell:
        return False
    number = cell.replace(".", "", 1).replace(",", "", 1).lstrip("+-").isdigit()
    return number or len(cell) > _LONGEST_NAME or "\n" in cell or cell[-1] in ".!?。！？" or len(cell.split()) > 5


def _records(file: DataFile, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """(line on which the record starts, its cells); blank lines are passed over."""
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file.path}, line {line:,}: {_why(str(error))}") from error


def _why(reason: str) -> str:
    if "expected after" in reason:
        return (
            f"malformed CSV ({reason}): a cell that begins with a double quote ends with the next one; write a quote "
            'inside a cell twice ("") and not with a backslash'
        )
    if "unexpected end" in reason:
        return f"malformed CSV ({reason}): the double quote that opens a cell there is never closed"
    return f"malformed CSV ({reason})"


def _delimiter(lines: list[str]) -> str:
    """The separator that cuts the first records into the most cells, the same number in each."""

    def score(delimiter: str) -> tuple[bool, int]:
        reader = csv.reader(lines, delimiter=delimiter)
        try:
            widths = [len(cells) for cells in islice(reader, 20) if cells]
        except csv.Error:
            return False, 0
        return len(set(widths)) == 1 and widths[0] > 1, widths[0] if widths else 0

    return max(",;\t|", key=score)


def _has_no_quoting(lines: list[str]) -> bool:
    """Whether a cell begins with a quote that does not enclose it, where lines are whole rows: quotes are text then."""
    rows = [line.rstrip("\r\n").split("\t") for line in lines if not line.isspace()]
    quoted = [cell for cells in rows for cell in cells if cell.startswith('"')]
    opened = any(len(cell) < 2 or not cell.endswith('"') for cell in quoted)
    return opened and len({len(cells) for cells in rows}) == 1


def _spaced(lines: list[str], delimiter: str) -> bool:
    """Whether a space follows every separator, in the header and in the rows: then it is no part of a cell."""
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        records = [cells[1:] for cells in islice(reader, 20) if len(cells) > 1]
    except csv.Error:
        return False
    inner = [cell for cells in records for cell in cells if cell]
    return len(records) > 1 and bool(inner) and all(cell.startswith(" ") for cell in inner)


def shown(text: str, width: int = 60) -> str:
    """The beginning of a cell, for people."""
    return repr(text[:width] + ("…" if len(text) > width else ""))
