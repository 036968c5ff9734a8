"""Rows of a sheet of a .xlsx workbook, as those of a CSV: what a cell holds, without the format that it is shown in."""

from collections.abc import Iterator
from contextlib import closing
from datetime import date, datetime, time, timedelta
from typing import Any

from topwork.common.errors import DataError, did_you_mean
from topwork.data.files.csv_rows import check_header, shown
from topwork.data.files.decoding import DataFile

Found = Iterator[tuple[dict[str, Any], str]]
_MIDNIGHT = time()


def xlsx_rows(file: DataFile) -> Found:
    """Rows under a header of column names, of the first sheet or the one that `file.split` names. Cells are text; a
    formula is its value as it was last computed.

    Raises DataError where the package for it is missing, the file or the sheet cannot be read, or a cell has no value
    of its own.
    """
    values, formulas = _opened(file, data_only=True), _opened(file, data_only=False)
    with closing(values), closing(formulas):
        name = _sheet(file, values)
        for sheet in (values[name], formulas[name]):
            sheet.reset_dimensions()  # what some programs write of its size is wrong
        header: list[str] = []
        for number, (cells, written) in enumerate(zip(values[name].iter_rows(), formulas[name].iter_rows()), 1):
            row = [_text(file, name, *both) for both in zip(cells, written)]
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = [cell.strip() for cell in row]
                check_header(file, header)
                continue
            yield _fields(file, header, row, number), f":{number}"


def _opened(file: DataFile, data_only: bool) -> Any:
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise DataError(
            f"{file.path}: a sheet of Excel is read with openpyxl, which is not installed; save its sheet as CSV in "
            "UTF-8, or pip install 'topwork[xlsx]'"
        ) from error
    try:
        return load_workbook(file.path, read_only=True, data_only=data_only)
    except Exception as error:  # the package raises what its zip and XML readers raise
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{file.path} cannot be read as .xlsx ({why[0]}); is it an older .xls, or has it a password? Open it and "
            "save its sheet as CSV in UTF-8"
        ) from error


def _sheet(file: DataFile, book: Any) -> str:
    """Which sheet is read; the others are told."""
    names = [sheet.title for sheet in book.worksheets]
    if file.split is None:
        shown_ones = [sheet.title for sheet in book.worksheets if sheet.sheet_state == "visible"]
        name = (shown_ones or names)[0]
    else:
        name = next((own for own in names if own.casefold() == file.split.casefold()), "")
    if not name:
        raise DataError(
            f"{file.path} has no sheet {file.split!r}{did_you_mean(str(file.split), names)}; its sheets are "
            f"{', '.join(names)}"
        )
    others = [own for own in names if own != name]
    if others and file.split is None:
        file.note(f"its sheet {name} is read; not read: {', '.join(others)} (name one as {file.path}:{others[0]})")
    return name


def _text(file: DataFile, sheet: str, cell: Any, written: Any) -> str:
    """What a cell holds, as text."""
    value = cell.value
    if value is None and written.value is None:
        return ""
    if value is None or cell.data_type == "e":
        what = f"the error {value}" if value is not None else "a formula whose value was never computed"
        raise DataError(
            f"{file.path}: the cell {sheet}!{written.coordinate} holds {what}; "
            + ("correct it there" if value is not None else "open the file, let it be computed, and save it")
        )
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, datetime) and value.time() == _MIDNIGHT:
        return value.date().isoformat()
    return value.isoformat() if isinstance(value, date | time) else _duration(value)


def _duration(value: object) -> str:
    """A span of time as sheets show it, 26:05:00; all else as it is."""
    if not isinstance(value, timedelta):
        return str(value)
    minutes, seconds = divmod(round(value.total_seconds()), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _fields(file: DataFile, header: list[str], cells: list[str], number: int) -> dict[str, str]:
    for at, cell in enumerate(cells):
        if cell.strip() and (at >= len(header) or (at and not header[at])):
            raise DataError(
                f"{file.path}, row {number:,}: {shown(cell)} stands in column {at + 1}, which has no name in the "
                "header; name it there, or take the column out"
            )
    width = max((at for at, name in enumerate(header, 1) if name), default=0)
    filled = [*cells, *[""] * (width - len(cells))]
    return {name: cell for name, cell in zip(header, filled) if name}
