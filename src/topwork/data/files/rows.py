"""Rows from files, folders and the Hub: a dictionary each, and where it stands. `formats` says what they mean."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from topwork.common.errors import DataError
from topwork.common.hub import ask_hub
from topwork.common.paths import missed
from topwork.common.yaml_text import quoted
from topwork.data.config import SourceConfig
from topwork.data.files.csv_rows import csv_rows
from topwork.data.files.decoding import DataFile, read_lines, read_text
from topwork.data.files.json_rows import json_rows, jsonl_rows
from topwork.data.files.places import kind_of
from topwork.data.files.sources import Located, locate
from topwork.data.files.tables import arrow_rows, dataset_rows, parquet_rows
from topwork.data.files.xlsx_rows import xlsx_rows

Found = Iterator[tuple[dict[str, Any], str]]


@dataclass(frozen=True)
class Row:
    """One row as it was read. `source` names it for people: `train.jsonl:17` (line), `train.json[17]` (index)."""

    fields: dict[str, Any]
    source: str


@dataclass(frozen=True)
class Reading:
    """A source's rows, and lines for the user: which files they are from, and what was noticed in them."""

    rows: list[Row]
    notes: tuple[str, ...] = ()


def read_rows(source: SourceConfig, documents: str = "file", max_rows: int | None = None) -> Reading:
    """The first `max_rows` rows, or all, of what a source names; `documents` is what one is in a .txt.

    Raises DataError for whatever cannot be read whole.
    """
    located = locate(source, documents)
    if located is None:
        rows, notes = _hub_rows(source, max_rows)
    else:
        rows = list(islice(_all_rows(located), max_rows))
        notes = [*located.notes, *(note for file in located.files for note in file.notes)]
    if not rows:
        raise DataError(f"{source.path} holds no rows; expected at least one (is the file empty?)")
    return Reading(rows, tuple(notes))


def _all_rows(located: Located) -> Iterator[Row]:
    """The rows of one file after the other. Raises DataError where a file's columns are all others than the first's."""
    reader = saved_rows if located.saved else file_rows
    first: tuple[DataFile, list[str]] | None = None
    for file in located.files:
        rows = reader(file)
        begin = next(rows, None)
        if begin is None:
            continue
        if begin.fields:
            first = first or (file, list(begin.fields))
        if first and begin.fields and set(begin.fields).isdisjoint(first[1]):
            raise DataError(
                f"{first[0].name} has the columns {', '.join(first[1])}, and {file.name} {', '.join(begin.fields)}: "
                f"files of one source hold rows of one kind; name each as a source: [{quoted(str(first[0].path))}, "
                f"{quoted(str(file.path))}]"
            )
        yield begin
        yield from rows


def file_rows(file: DataFile) -> Iterator[Row]:
    """The rows of one file, read as they are asked for. Raises DataError, also after some rows."""
    for fields, place in READERS[kind_of(file.path)](file):
        yield Row(fields, f"{file.name}{place}")


def saved_rows(file: DataFile) -> Iterator[Row]:
    """The rows of a data set that `save_to_disk` wrote, which `file.path` is the folder of."""
    from datasets import load_from_disk

    try:
        table = load_from_disk(str(file.path))
    except Exception as error:  # the library raises whatever its readers raise
        raise DataError(f"{file.path} cannot be read as what save_to_disk wrote ({_reason(error)})") from error
    for fields, place in dataset_rows(file, table):
        yield Row(fields, f"{file.name}{place}")


def _txt(file: DataFile) -> Found:
    """The whole text, or what stands between blank lines, or a line; without the line breaks around it."""
    if file.documents == "file":
        text = read_text(file).replace("\r\n", "\n").strip("\n")
        yield {"text": text}, ""
        return
    block: list[str] = []
    number = 0
    for number, line in enumerate(read_lines(file), 1):
        text = line.removesuffix("\n").removesuffix("\r")
        if text.strip() and file.documents == "line":
            yield {"text": text}, f":{number}"
        elif text.strip():
            block.append(text)
        elif block:
            yield {"text": "\n".join(block)}, f":{number - len(block)}"
            block = []
    if block:
        yield {"text": "\n".join(block)}, f":{number - len(block) + 1}"


def _hub_rows(source: SourceConfig, max_rows: int | None) -> tuple[list[Row], list[str]]:
    table, note = hub_table(source, max_rows)
    file = hub_file(source)
    rows = [Row(fields, f"{source.path}{place}") for fields, place in dataset_rows(file, table)]
    return rows, [note, *file.notes]


def hub_file(source: SourceConfig) -> DataFile:
    """A data set of the Hub as what its rows are told from."""
    return DataFile(Path(source.path), source.path, chosen=bool(source.columns) or source.format not in (None, "auto"))


def hub_table(source: SourceConfig, max_rows: int | None) -> tuple[Any, str]:
    """A data set of the Hub, as `datasets` loads it, and which split it is. Raises DataError."""
    repository, _, rest = source.path.partition(":")
    config, _, split = rest.partition(":")
    several = [split] if split else [name or "train" for name in (source.split or "").split("|")]
    ask_hub(repository, None, "dataset", missed(repository))
    from datasets import load_dataset

    for part in several:
        try:
            table = load_dataset(repository, config or None, split=part + (f"[:{max_rows}]" if max_rows else ""))
            break
        except Exception as error:  # the library raises whatever its network, cache and builders raise
            if part != several[-1] and "Unknown split" in str(error):
                continue
            raise DataError(
                f"{source.path} is no local file or folder, and loading it from the Hub failed ({_reason(error)}). "
                "Expected an existing path, or owner/name[:config[:split]] and a network connection"
            ) from error
    return table, f"{source.path}: its {part} split is read"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"


READERS: dict[str, Callable[[DataFile], Found]] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    ".xlsx": xlsx_rows,
    ".txt": _txt,
}
