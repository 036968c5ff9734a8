"""What a recipe's sources hold: rows, the format they are in, and the conversations that they become."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from topwork.common.errors import DataError
from topwork.common.yaml_text import quoted
from topwork.data.config import DataConfig, SourceConfig, Sources, called
from topwork.data.conversations import BadRow, Conversation
from topwork.data.files.rows import Row, read_rows
from topwork.data.meaning.formats import Format, read_conversations, recognise
from topwork.data.meaning.mapping import columns_of


@dataclass(frozen=True)
class Part:
    """One source's rows, and what was made of them.

    conversations  of the rows that can be used, in their order; `Conversation.source` is `Row.source`
    bad            the others, and why
    notes          lines for the user: which files were read, and what was noticed in them
    """

    source: SourceConfig
    format: Format
    rows: Sequence[Row]
    conversations: list[Conversation]
    bad: list[BadRow]
    notes: tuple[str, ...] = ()


def read_parts(config: DataConfig, named: Sources, max_rows: int | None = None) -> list[Part]:
    """Every source of `data.train` or `data.eval`, read whole. Bad rows are kept beside the good ones.

    max_rows  of all sources together

    Raises DataError for what cannot be read at all.
    """
    found: list[Part] = []
    names: set[str] = set()
    left = max_rows
    for number, source in enumerate(config.sources(named), 1):
        if left == 0:
            break
        reading = read_rows(source, config.documents, source.at_most(left))
        rows = reading.rows
        left = None if left is None else left - len(rows)
        if not names.isdisjoint(row.source for row in rows):  # files of one name in two folders, or one file twice
            rows = [replace(row, source=f"source {number}, {row.source}") for row in rows]
        names.update(row.source for row in rows)
        try:
            found.append(replace(part_of(config, source, rows), notes=reading.notes))
        except DataError as error:  # what was noticed is often why
            raise DataError("; ".join([str(error), *reading.notes])) from error
    return found


def look_for(config: DataConfig, named: Sources) -> None:
    """Whether every source to evaluate on is there and can be begun to read. Raises DataError where one cannot."""
    for source in config.sources(config.reading(named).train):
        read_rows(source, config.documents, 1)


def part_of(config: DataConfig, source: SourceConfig, rows: Sequence[Row]) -> Part:
    """What rows of a source become. Raises DataError where their format is not known or is not what is asked for."""
    own, format = config.of_source(source), format_of(config, source, rows)
    if config.too_long == "split" and format.name != "text":
        raise DataError(
            f"data.too_long is split, which cuts plain text in pieces, but {source.path} was {format.sentence}; "
            "set it to refuse, truncate, drop, oldest_turns or middle"
        )
    conversations, bad = read_conversations(rows, format, own)
    return Part(source, format, rows, conversations, bad)


def format_of(config: DataConfig, source: SourceConfig, rows: Sequence[Row]) -> Format:
    """How a source's rows are read. Raises DataError where that is not known, naming the source."""
    try:
        return recognise(rows, config.of_source(source))
    except DataError as error:
        raise DataError(f"{called(source.path)}: {error}{_own_columns(config, source, rows, str(error))}") from error


_MAPPING = re.compile(r'data\.columns: (\{(?:"(?:\\.|[^"\\])*"|[^"{}])*\})')


def _own_columns(config: DataConfig, source: SourceConfig, rows: Sequence[Row], error: str) -> str:
    """What to say of one of several sources: `data.columns` is for all of them that name none."""
    sides = [*config.sources(config.train), *(config.sources(config.eval) if config.eval is not None else [])]
    if len(sides) < 2:
        return ""
    advised = _MAPPING.search(error)
    own = advised[1] if advised else "{}"
    names = dict.fromkeys(name for row in rows for name in row.fields)
    meant = source.columns != config.columns or all(
        column in names for spec in config.columns.values() for column in columns_of(spec, names)
    )
    if meant and not advised:
        return ""
    begins = "If data.columns is meant for another source" if not meant else "Where other sources have other columns"
    return f". {begins}, give this one its own: {{path: {quoted(source.path)}, columns: {own}}}"


Formats = Sequence[tuple[SourceConfig, Format]]
"""The sources of one side, and how each was read."""


def sentences(read: Formats) -> tuple[str, ...]:
    """How each source was read; which one is said where there are several."""
    return (read[0][1].sentence,) if len(read) == 1 else _named(read)


def other_sentences(read: Formats, known: Formats) -> tuple[str, ...]:
    """How sources were read, where that is not as those of the other side."""
    before = [(format.name, format.columns) for _, format in known]
    return _named([each for each in read if (each[1].name, each[1].columns) not in before])


def _named(read: Formats) -> tuple[str, ...]:
    return tuple(f"{called(source.path)}: {format.sentence}" for source, format in read)
