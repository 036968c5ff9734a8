"""Rows that stay on disk (`data.streaming`): found and checked once, then read and encoded when a step needs them.

Of a row a few numbers of 4 or 8 bytes are held. What is learned is what would be learned without streaming, in the same
order; only what can be found by rendering alone (a sequence that is too long, a row that the template refuses) is found
when the row is needed.
"""

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from topwork.common.errors import DataError
from topwork.common.files import sha256_bytes
from topwork.data.config import DataConfig, SourceConfig, Sources
from topwork.data.conversations import BadRow, Conversation
from topwork.data.copies import PACKED, TABLES, Log, TableRows, unpacked
from topwork.data.formats import Format, read_conversations, recognise, refuse_bad
from topwork.data.index import FileRows, IndexedRows, Joined, by_owner
from topwork.data.layouts import layout_of
from topwork.data.rows import _folder_files
from topwork.data.template import ChatTemplate

if TYPE_CHECKING:
    from topwork.data.examples import Counts, Example

_CHUNK = 2048  # rows that are conversations at the same time while all are checked
_NAMED = 1000  # bad rows that are kept by name
Encode = Callable[[Sequence[Conversation], int, Sequence[BadRow]], "tuple[list[Example], Counts]"]


@dataclass
class StreamedPart:
    """One source's rows, found and checked.

    usable    the numbers of the rows that can be used
    groups    of each usable row a hash of what must not be held out apart from it
    contents  of each usable row a hash of all of it; empty where nobody asks
    bad       the first of the others, by name; `bad_count` is of all
    systems   up to two conversations whose system messages differ
    """

    source: SourceConfig
    own: DataConfig
    format: Format
    rows: IndexedRows
    usable: "array[int]" = field(default_factory=lambda: array("i"))
    groups: "array[int]" = field(default_factory=lambda: array("q"))
    contents: "array[int]" = field(default_factory=lambda: array("q"))
    bad: list[BadRow] = field(default_factory=list)
    bad_count: int = 0
    systems: dict[str | None, Conversation] = field(default_factory=dict)

    def conversations(self, numbers: Sequence[int]) -> tuple[list[Conversation], list[BadRow]]:
        """Rows as conversations, and those that cannot be used."""
        return read_conversations(list(self.rows.read(numbers)), self.format, self.own)

    def check(self, by_group: bool, by_content: bool) -> None:
        """Make a conversation of every row, once, and keep what is held of it."""
        for start in range(0, len(self.rows), _CHUNK):
            numbers = range(start, min(start + _CHUNK, len(self.rows)))
            rows = list(self.rows.read(numbers))
            good, bad = read_conversations(rows, self.format, self.own)
            unusable = {row.source for row in bad}
            self.usable.extend(at for at, row in zip(numbers, rows) if row.source not in unusable)
            self.bad_count += len(bad)
            self.bad += bad[: _NAMED - len(self.bad)]
            for conversation in good:
                if by_group:
                    self.groups.append(_hash(conversation.messages[:-1], conversation.tools, conversation.text))
                if by_content:
                    self.contents.append(_hash(conversation.messages, conversation.tools, conversation.text))
                if len(self.systems) < 2:
                    self.systems.setdefault(_system(conversation), conversation)
            if self.own.on_bad_row == "refuse" and len(self.bad) == _NAMED:
                break  # to be refused, and named enough


def _hash(*what: object) -> int:
    return int.from_bytes(
        blake2b(repr(what).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True
    )


def _system(conversation: Conversation) -> str | None:
    first = conversation.messages[:1]
    return first[0].content if first and first[0].role == "system" else None


def read_streamed(
    config: DataConfig, named: Sources, max_rows: int | None, log: Log, by_group: bool = False, by_content: bool = False
) -> list[StreamedPart]:
    """Every source of `data.train` or `data.eval`, found and checked.

    max_rows              of all sources together
    by_group, by_content  whether `groups` and `contents` are wanted

    Raises DataError for what cannot be read or streamed, and for bad rows unless the recipe drops them.
    """
    found: list[StreamedPart] = []
    left = max_rows
    for source in config.sources(named):
        if left == 0:
            break
        limits = [limit for limit in (source.max_rows, left) if limit is not None]
        own = config.of_source(source)
        rows = indexed_rows(source, own, min(limits, default=None), log)
        left = None if left is None else left - len(rows)
        try:
            format = recognise(rows, own)
        except DataError as error:
            raise DataError(f"{source.path}: {error}") from error
        found.append(StreamedPart(source, own, format, rows))
        found[-1].check(by_group, by_content)
    bad = [row for part in found for row in part.bad]
    refuse_bad(bad, sum(len(part.rows) for part in found), config)
    return found


def indexed_rows(source: SourceConfig, own: DataConfig, limit: int | None, log: Log) -> IndexedRows:
    """Where a source's rows stand. Raises DataError for what cannot be streamed."""
    path = Path(source.path).expanduser()
    if not path.is_dir():
        return _file_rows(path, own, limit, log)
    parts: list[IndexedRows] = []
    for file in _folder_files(path):
        left = None if limit is None else limit - sum(map(len, parts))
        if left != 0:
            parts.append(_file_rows(file, own, left, log))
    return Joined(parts)


def _file_rows(path: Path, own: DataConfig, limit: int | None, log: Log) -> IndexedRows:
    content = unpacked(path, log) if path.suffix.lower() in PACKED else path
    if content.suffix.lower() in TABLES:
        return TableRows(content, log, limit)
    return FileRows(content, layout_of(content, own), limit, path)


def usable_numbers(parts: Sequence[StreamedPart]) -> np.ndarray:
    """The numbers of rows that can be used, counted through all parts [rows] int32, or int64 where they are many."""
    firsts = [0, *accumulate(len(part.rows) for part in parts)]
    kind = np.int32 if firsts[-1] < 2**31 else np.int64
    return np.concatenate([np.add(part.usable, first, dtype=kind) for part, first in zip(parts, firsts)])


def split_streamed(parts: Sequence[StreamedPart], config: DataConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the rows to learn, and of those held out, each in the order of the files."""
    numbers = usable_numbers(parts)
    count = len(numbers)
    fraction = 0.0 if config.eval is not None else config.eval_fraction
    held = min(max(1, round(count * fraction)), count - 1) if fraction > 0 else 0
    out = np.zeros(count, dtype=bool)
    out[np.random.default_rng(seed).permutation(count)[: max(0, held)]] = True
    return numbers[~out], numbers[out]


def drawn_rows(numbers: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many of them, drawn by seed, in their order."""
    if len(numbers) <= most:
        return numbers
    return numbers[np.sort(np.random.default_rng([seed, 1]).choice(len(numbers), most, replace=False))]


def streamed_conversations(parts: Sequence[StreamedPart], numbers: np.ndarray) -> list[Conversation]:
    """Rows that can be used, by their numbers through all parts."""
    firsts = [0, *accumulate(len(part.rows) for part in parts[:-1])]
    return [row for at, own in by_owner(firsts, numbers.tolist()) for row in parts[at].conversations(own)[0]]


def streamed_digest(parts: Sequence[StreamedPart], config: DataConfig, template: ChatTemplate, longest: int) -> str:
    """What tells streamed training rows from others; where files lie does not count, nor what is done with rows that
    are left out: such rows a run has not met yet."""
    read = config.model_dump(mode="json", exclude={"train", "eval", "chat_template", "too_long", "on_bad_row"})
    sources = [part.source.model_dump(mode="json", exclude={"path"}) | {"rows": part.rows.digest()} for part in parts]
    backend = getattr(template.tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(template.tokenizer.get_vocab(), sort_keys=True)
    return sha256_bytes(
        json.dumps([read, longest, sources, template.jinja, sha256_bytes(vocabulary.encode())]).encode()
    )


class StreamedExamples(Sequence["Example"]):
    """The training rows of a recipe, each encoded when it is asked for. What is counted and indexed is rows, of which
    most templates make one sequence each.

    longest  what no sequence is longer than, in tokens
    digest   what tells them from others: of the files, of how they are read, and of the template and the tokenizer
    """

    def __init__(
        self, parts: Sequence[StreamedPart], numbers: np.ndarray, encode: Encode, longest: int, digest: str
    ) -> None:
        """`numbers` are those of rows that can be used, counted through all parts, in the order of the data set."""
        self.parts, self.numbers, self._encode = parts, numbers, encode
        self.longest, self.digest = longest, digest
        self._firsts = [0, *accumulate(len(part.rows) for part in parts[:-1])]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> "Example": ...

    @overload
    def __getitem__(self, at: slice) -> "list[Example]": ...

    def __getitem__(self, at: "int | slice") -> "Example | list[Example]":
        """A row's (first) sequence, or all sequences of some. Raises DataError for a row that cannot be learned."""
        if isinstance(at, slice):
            return self.take(range(len(self))[at])[0]
        found, _ = self.take([range(len(self))[at]])
        if not found:
            raise DataError(f"row {at} is left out: it is too long, or the chat template refuses it")
        return found[0]

    def __iter__(self) -> "Iterator[Example]":
        for start in range(0, len(self), _CHUNK):
            yield from self[start : start + _CHUNK]

    def take(self, places: Sequence[int]) -> "tuple[list[Example], Counts]":
        """The sequences of rows by their places, in this order, and what was counted. Raises DataError for what the
        recipe refuses."""
        conversations: list[Conversation] = []
        bad: list[BadRow] = []
        for owner, own in by_owner(self._firsts, (int(self.numbers[place]) for place in places)):
            good, unusable = self.parts[owner].conversations(own)
            conversations += good
            bad += unusable
        return self._encode(conversations, len(places), bad)

    def check_unchanged(self) -> None:
        """Raises RunError where a file is no more what was indexed."""
        for part in self.parts:
            part.rows.check_unchanged()
