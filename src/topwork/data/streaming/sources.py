"""Sources whose rows stay on disk (`data.streaming`): found and checked once, by some 4 and 8 bytes of each row."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate

import numpy as np

from topwork.common.errors import DataError
from topwork.data.chat.template import ChatTemplate
from topwork.data.config import DataConfig, SourceConfig, Sources
from topwork.data.conversations import BadRow, Conversation
from topwork.data.files.decoding import DataFile
from topwork.data.files.places import kind_of
from topwork.data.files.rows import Row, file_rows, hub_file, hub_table, saved_rows
from topwork.data.files.sources import locate
from topwork.data.files.tables import dataset_rows
from topwork.data.meaning.formats import Format, read_conversations
from topwork.data.parts import Formats, format_of
from topwork.data.splitting import held_rows, is_first, no_such_column, times, unit_numbers, unit_of, weight_note
from topwork.data.streaming.copies import copied_rows
from topwork.data.streaming.index import IndexedRows, Joined, by_owner
from topwork.data.streaming.plain import plain_rows
from topwork.data.summary import NAMED, Note, Tally, dropped_notes, file_notes, refuse_bad

Log = Callable[[str], None]
_CHUNK = 1000  # rows that are conversations at the same time while all are checked
_BAD = 1000  # bad rows that are kept by name
_LARGEST_DOCUMENT = 1 << 26  # bytes of a text file that is one row


def source_rows(
    source: SourceConfig, config: DataConfig, names: set[str], number: int, limit: int | None, log: Log
) -> tuple[IndexedRows, list[str]]:
    """Where a source's rows are, and what is to be told of its files.

    names   those of the sources before; a file of one of these is told by the number of its source

    Raises DataError for what cannot be read.
    """
    located = locate(source, config.documents)
    if located is None:
        table, note = hub_table(source, limit)
        file = hub_file(source)
        made = lambda: (Row(fields, f"{source.path}{place}") for fields, place in dataset_rows(file, table))  # noqa: E731
        return copied_rows(source.path, made, file.notes, limit, (), f"{table._fingerprint}", log), [note, *file.notes]
    before = f"source {number}, " if not names.isdisjoint(file.name for file in located.files) else ""
    names |= {file.name for file in located.files}
    parts: list[IndexedRows] = []
    for file in located.files:
        left = None if limit is None else limit - sum(map(len, parts))
        if left != 0:
            parts.append(_rows_of(file, located.saved, before, left, log))
    if not any(map(len, parts)):
        raise DataError(f"{source.path} holds no rows; expected at least one (is the file empty?)")
    return Joined(parts), [*located.notes, *(note for file in located.files for note in file.notes)]


def _rows_of(file: DataFile, saved: bool, before: str, limit: int | None, log: Log) -> IndexedRows:
    if file.documents == "file" and kind_of(file.path) == ".txt" and file.path.stat().st_size > _LARGEST_DOCUMENT:
        raise DataError(
            f"{file.path} has {file.path.stat().st_size:,} bytes and is a single row, because data.documents is file; "
            "set data.documents: paragraph or line to stream it"
        )
    plain = None if saved or file.encoding not in (None, "utf-8") else plain_rows(file, limit, before + file.name)
    if plain is not None:
        return plain
    reader = saved_rows if saved else file_rows
    key = f"{file.name} {file.encoding} {file.documents} {file.split} {file.chosen}"
    return copied_rows(file.name, lambda: reader(file), file.notes, limit, [file.path], key, log, before)


@dataclass
class StreamedPart:
    """One source's rows, found and checked.

    usable    the numbers of the rows that became conversations
    units     of each of these a hash of what must not be held out apart from it
    contents  of each of these a hash of all of it
    grouped   how many of these have something that they must not be parted from
    bad       the first of the others, by name; `bad_count` is of all
    systems   up to two conversations whose system messages differ
    shown     conversations that show a template everything that it looks at in all of them
    """

    source: SourceConfig
    own: DataConfig
    format: Format
    rows: IndexedRows
    notes: list[str]
    usable: "array[int]" = field(default_factory=lambda: array("i"))
    units: "array[int]" = field(default_factory=lambda: array("q"))
    contents: "array[int]" = field(default_factory=lambda: array("q"))
    grouped: int = 0
    bad: list[BadRow] = field(default_factory=list)
    bad_count: int = 0
    tally: Tally = field(default_factory=Tally)
    systems: dict[str | None, Conversation] = field(default_factory=dict)
    shown: dict[tuple[str, bool], Conversation] = field(default_factory=dict)

    def conversations(self, numbers: Sequence[int]) -> tuple[list[Conversation], list[BadRow]]:
        """Rows as conversations, and those that cannot be used."""
        return read_conversations(self.rows.read(numbers), self.format, self.own)

    def check(self, template: ChatTemplate) -> None:
        """Make a conversation of every row, once, and keep what is held of it."""
        by = self.own.hold_out_by
        for start in range(0, len(self.rows), _CHUNK):
            numbers = range(start, min(start + _CHUNK, len(self.rows)))
            rows = list(self.rows.read(numbers))
            good, bad = read_conversations(rows, self.format, self.own)
            unusable = {row.source for row in bad}
            self.usable.extend(at for at, row in zip(numbers, rows) if row.source not in unusable)
            self.bad_count += len(bad)
            self.bad += bad[: _BAD - len(self.bad)]
            for row in good:
                if by != "row":
                    unit = unit_of(row, by)
                    self.grouped += unit is not None
                    self.units.append(_hash("row", row.source) if unit is None else _hash(unit))
                self.contents.append(content_of(row))
                self.tally.add(row.notes, row.source)
                self.shown.setdefault(template.surveyed(row), row)
                if len(self.systems) < 2:
                    self.systems.setdefault(_system(row), row)
            if self.own.on_bad_row == "refuse" and len(self.bad) == _BAD:
                return  # to be refused, and named enough


def content_of(row: Conversation) -> int:
    """A hash of all that a row says: the same for rows of which the same is learned."""
    return _hash(row.messages, row.tools, row.text)


def _hash(*what: object) -> int:
    """A number of eight bytes; two in ten million different ones are the same with a chance of three in a million."""
    made = blake2b(repr(what).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(made.digest(), "big", signed=True)


def _system(row: Conversation) -> str | None:
    return row.messages[0].content if row.messages and row.messages[0].role == "system" else None


def read_streamed(
    config: DataConfig, named: Sources, max_rows: int | None, template: ChatTemplate, log: Log
) -> "Streamed":
    """Every source of `data.train` or `data.eval`, found and checked.

    max_rows  of all sources together

    Raises DataError for what cannot be read or streamed, and for bad rows unless the recipe drops them.
    """
    found: list[StreamedPart] = []
    names: set[str] = set()
    left = max_rows
    for number, source in enumerate(config.sources(named), 1):
        if left == 0:
            break
        rows, notes = source_rows(source, config, names, number, source.at_most(left), log)
        left = None if left is None else left - len(rows)
        try:
            format = format_of(config, source, rows)
        except DataError as error:  # what was noticed is often why
            raise DataError("; ".join([str(error), *notes])) from error
        found.append(StreamedPart(source, config.of_source(source), format, rows, notes))
        found[-1].check(template)
    bad = [row for part in found for row in part.bad]
    refuse_bad(bad, sum(len(part.rows) for part in found), config)
    template.survey([row for part in found for row in part.shown.values()])
    return Streamed(found)


class Streamed:
    """The sources of one side. Rows are counted through all of them. Numbers and hashes are given away, and asked for
    once."""

    def __init__(self, parts: Sequence[StreamedPart]) -> None:
        self.parts = parts
        self.count = sum(len(part.rows) for part in parts)
        self.bad_count = sum(part.bad_count for part in parts)
        self._firsts = [0, *accumulate(len(part.rows) for part in parts[:-1])]

    @property
    def ways(self) -> Formats:
        """How each source was read."""
        return [(part.source, part.format) for part in self.parts]

    @property
    def notes(self) -> list[Note]:
        """What was noticed in the files, and in the rows before they meet a template."""
        return [
            *file_notes(text for part in self.parts for text in part.notes),
            *dropped_notes([row for part in self.parts for row in part.bad]),
            *(note for part in self.parts for note in part.tally.notes()),
        ]

    def numbers(self) -> np.ndarray:
        """Of the rows that became conversations; [rows] int32, or int64 where they are many."""
        kind = np.int32 if self.count < 2**31 else np.int64
        found = [np.add(part.usable, first, dtype=kind) for part, first in zip(self.parts, self._firsts)]
        for part in self.parts:
            part.usable = array("i")
        return _one(found)

    def contents(self) -> np.ndarray:
        """Their hashes; [rows] int64."""
        found = _one([np.asarray(part.contents) for part in self.parts])
        for part in self.parts:
            part.contents = array("q")
        return found

    def units(self) -> np.ndarray:
        """Hashes of what they must not be parted from; [rows] int64."""
        found = _one([np.asarray(part.units) for part in self.parts])
        for part in self.parts:
            part.units = array("q")
        return found

    def conversations(self, numbers: Sequence[int]) -> tuple[list[Conversation], list[BadRow]]:
        """Rows by their numbers, in this order, and those of them that cannot be used."""
        found: list[Conversation] = []
        bad: list[BadRow] = []
        for owner, own in by_owner(self._firsts, numbers):
            good, unusable = self.parts[owner].conversations(own)
            found += good
            bad += unusable
        return found, bad

    def part_numbers(self, numbers: np.ndarray, part: int) -> np.ndarray:
        """The places of a part's rows among `numbers`."""
        first = self._firsts[part]
        return np.flatnonzero((numbers >= first) & (numbers < first + len(self.parts[part].rows)))


def _one(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


@dataclass(frozen=True)
class Split:
    """Numbers of rows: those that an epoch sees, in the order of the data set; how many rows they are; those held out.

    contents  sorted hashes of the rows to learn, where rows that say the same can stand on both sides
    """

    train: np.ndarray
    rows: int
    held: np.ndarray
    copies: int
    notes: tuple[Note, ...]
    contents: np.ndarray


def split_streamed(read: Streamed, config: DataConfig, seed: int) -> Split:
    """What is learned and what is held out, as without streaming but for what only rendering would find."""
    contents = read.contents()
    first = is_first(contents)
    apart = config.eval is None and config.hold_out_by == "prompt"
    if apart:  # before more is made of as many rows
        contents = np.empty(0, dtype=np.int64)
    numbers, copies = read.numbers(), np.flatnonzero(~first)
    notes = list(_copies(read, numbers[copies[:NAMED]], len(copies), config)) if len(copies) else []
    usable = first if config.duplicates == "drop" else np.ones(len(numbers), dtype=bool)
    held, told = _held(read, usable, config, seed)
    kept = usable & ~held
    train, weighted = _weighted(read, numbers[kept], seed)
    dropped = len(copies) if config.duplicates == "drop" else 0
    learned = contents if apart else np.sort(contents[kept])
    return Split(train, int(kept.sum()), numbers[held], dropped, (*notes, *told, *weighted), learned)


def _copies(read: Streamed, named: np.ndarray, count: int, config: DataConfig) -> tuple[Note, ...]:
    sources = tuple(row.source for row in read.conversations(named.tolist())[0])
    if config.duplicates == "drop":
        return (Note("the same as an earlier one", count, sources, dropped=True),)
    text = "the same as an earlier one; data.duplicates: drop keeps the first alone"
    return (Note(text, count, sources, warning=True),)


def _held(read: Streamed, usable: np.ndarray, config: DataConfig, seed: int) -> tuple[np.ndarray, tuple[Note, ...]]:
    by = config.hold_out_by
    if config.eval is not None or not config.eval_fraction:
        return np.zeros(len(usable), dtype=bool), ()
    if by == "row":
        return held_rows(np.arange(len(usable)), usable, config.eval_fraction, seed, by)
    if not any(part.grouped for part in read.parts):
        raise no_such_column(by)
    return held_rows(unit_numbers(read.units()), usable, config.eval_fraction, seed, by)


def _weighted(read: Streamed, numbers: np.ndarray, seed: int) -> tuple[np.ndarray, list[Note]]:
    """The numbers as often as an epoch sees them, by their source's weight."""
    if all(part.source.weight == 1.0 for part in read.parts):
        return numbers, []
    often = np.ones(len(numbers), dtype=np.int64)
    notes = []
    for at, part in enumerate(read.parts):
        if part.source.weight != 1.0:
            own = read.part_numbers(numbers, at)
            often[own] = times(len(own), part.source.weight, seed, at)
            notes.append(weight_note(part.source, int(often[own].sum()), len(own)))
    return np.concatenate([numbers[often > turn] for turn in range(int(often.max(initial=0)))]), notes


def drawn_rows(numbers: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many of them, drawn by seed, in their order."""
    if len(numbers) <= most:
        return numbers
    return numbers[np.sort(np.random.default_rng([seed, 1]).choice(len(numbers), most, replace=False))]
