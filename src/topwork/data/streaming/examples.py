"""Training rows that are read from disk and encoded when a step needs them (`data.streaming`).

What is learned is what would be learned without streaming, in the same order. Only what rendering alone can find (a
sequence that is too long, a row that the template refuses) is found when the row is needed.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, overload

import numpy as np

from topwork.common.errors import DataError
from topwork.common.files import sha256_bytes
from topwork.data.chat.template import PROVED, ChatTemplate
from topwork.data.config import DataConfig, told
from topwork.data.conversations import BadRow, Conversation
from topwork.data.examples import Data, Example, measured
from topwork.data.fitting import Fitting
from topwork.data.parts import other_sentences, sentences
from topwork.data.reading import arrays, encoded
from topwork.data.streaming.sources import Log, Split, Streamed, content_of, drawn_rows, read_streamed, split_streamed
from topwork.data.summary import NAMED, Counts, DataSummary, Note, Tally, added, dropped_notes, refuse_bad

EVAL_ROWS = 2000
"""Rows that are validated on while training rows are streamed, drawn by seed where more are held out."""
_CHUNK = PROVED  # rows that are encoded at a time: of so many each is proved, so that none depends on those before it


@dataclass(frozen=True)
class Taken:
    """Rows that were read and encoded, and what became of them.

    rows   the conversations of which something is left
    notes  what their rendering left out or changed
    """

    examples: list[Example]
    rows: list[Conversation]
    counts: Counts
    notes: list[Note]


class StreamedExamples(Sequence[Example]):
    """The training rows of a recipe, each encoded when it is asked for. What is counted and indexed is rows, of which
    most templates make one sequence each.

    longest  what no sequence is longer than, in tokens
    digest   what tells them from others: of the files, of how they are read, of the template and the tokenizer
    check    looks at examples as they are read; raises DataError for those that nobody can learn from
    """

    def __init__(
        self, read: Streamed, numbers: np.ndarray, config: DataConfig, template: ChatTemplate, longest: int
    ) -> None:
        """`numbers` are of rows that became conversations, in the order of the data set."""
        self.read, self.numbers, self.longest = read, numbers, longest
        self._config, self._template = config, template
        self.digest = _digest(read, config, template, longest)
        self.check: Callable[[Sequence[Example]], None] = lambda _: None

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> Example: ...

    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...

    def __getitem__(self, at: int | slice) -> Example | list[Example]:
        """A row's (first) sequence, or all sequences of some. Raises DataError for a row that cannot be learned."""
        if isinstance(at, slice):
            return self.take(range(len(self))[at]).examples
        found = self.take([range(len(self))[at]]).examples
        if not found:
            raise DataError(f"row {at} is left out: it is too long, or the chat template refuses it")
        return found[0]

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), _CHUNK):
            yield from self[start : start + _CHUNK]

    def take(self, places: Sequence[int]) -> Taken:
        """The sequences of rows by their places, in this order. Raises DataError for what the recipe refuses."""
        found = take(self.read, self.numbers[list(places)].tolist(), self._config, self._template, self.longest)
        self.check(found.examples)
        return found

    def check_unchanged(self) -> None:
        """Raises RunError where a file is no more what was indexed."""
        for part in self.read.parts:
            part.rows.check_unchanged()


def take(read: Streamed, numbers: Sequence[int], config: DataConfig, template: ChatTemplate, max_length: int) -> Taken:
    """Rows by their numbers, encoded and made to fit. Raises DataError for what the recipe refuses."""
    fitting, tally = Fitting(config, template, max_length), Tally()
    examples: list[Example] = []
    rows: list[Conversation] = []
    bad: list[BadRow] = []
    counts = Counts()
    for start in range(0, len(numbers), _CHUNK):
        conversations, unusable = read.conversations(numbers[start : start + _CHUNK])
        fitted, refused = encoded(conversations, config, template, fitting)
        bad += [*unusable, *refused]
        counts = added(counts, (row.fates for row in fitted))
        for row, before in zip(fitted, conversations):
            tally.add([note for note in row.notes if note not in before.notes], before.source)
            rows += [row.conversation] if row.sequences else []
            examples += [Example(*arrays(item), before.source) for item in row.sequences]
    refuse_bad(bad, len(numbers), config)
    fitting.check()
    counts = replace(counts, rows=len(numbers), bad_rows=len(bad))
    return Taken(examples, rows, measured(counts, examples), [*dropped_notes(bad), *tally.notes()])


def load_streamed(
    config: DataConfig, template: ChatTemplate, max_length: int, seed: int, log: Log, counts: bool = True
) -> Data:
    """`load_data` with the training rows left on disk; at most `EVAL_ROWS` rows are held to validate on."""
    if config.too_long == "split":
        raise DataError(
            "data.too_long is split, which makes many sequences of a row, and streaming keeps those of a row in one "
            "step; set data.documents: paragraph or line for shorter rows, and data.too_long: truncate or drop"
        )
    read = read_streamed(config, config.train, config.max_rows, template, log)
    split = split_streamed(read, config, seed)
    if not len(split.train):
        raise DataError(f"{told(config.train)}: no row is left to train on")
    apart = read if config.eval is None else read_streamed(config, config.eval, None, template, log)
    candidates = split.held if config.eval is None else apart.numbers()
    drawn = drawn_rows(candidates, EVAL_ROWS, seed if config.eval is None else 0)
    held = take(apart, drawn.tolist(), config, template, max_length)
    if apart is not read:  # as where rows are held, with those that became no conversation
        rows, bad = held.counts.rows + apart.bad_count, held.counts.bad_rows + apart.bad_count
        held = replace(held, counts=replace(held.counts, rows=rows, bad_rows=bad))
    if config.eval is not None and not held.examples:
        raise DataError(f"{told(config.eval)}: no row is left to validate on ({held.counts.line('eval')})")
    summary = _summary(config, template, read, apart, split, held, len(drawn), len(candidates))
    for line in summary.lines(counts):
        log(line)
    train = StreamedExamples(read, split.train, config, template, max_length)
    systems = [row for part in read.parts for row in part.systems.values()]
    asked = [row for row in held.rows if row.kind == "chat"]
    return Data(train, tuple(held.examples), tuple(systems), tuple(asked), template, summary, train.longest)


def _summary(
    config: DataConfig, template: ChatTemplate, read: Streamed, apart: Streamed, split: Split, held: Taken, drawn: int,
    candidates: int,
) -> DataSummary:  # fmt: skip
    rows = read.count - (candidates if apart is read else 0)
    counts = Counts(rows, read.bad_count, split.copies, sequences=len(split.train), streamed=True)
    reading = [Note(template.reading)] if template.reading else []
    notes = [*reading, *read.notes, *split.notes, *([] if apart is read else apart.notes), *held.notes]
    if drawn < candidates:
        notes.append(Note(f"{drawn:,} of {candidates:,} rows that are held out are validated on, drawn by seed"))
    told_of = (*sentences(read.ways), *other_sentences(apart.ways, read.ways))
    across = sum(content_of(row) in _Sorted(split.contents) for row in held.rows)
    return DataSummary(told_of, counts, held.counts, config.eval is None, across, 0, tuple(notes))


class _Sorted:
    """Whether a number is one of some that are sorted."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers

    def __contains__(self, number: int) -> bool:
        at = int(np.searchsorted(self.numbers, number))
        return at < len(self.numbers) and int(self.numbers[at]) == number


def _digest(read: Streamed, config: DataConfig, template: ChatTemplate, longest: int) -> str:
    """What tells streamed rows from others. Where files lie does not count, nor what is done with rows that are left
    out: a run that refuses them has not met any yet."""
    options = config.model_dump(mode="json", exclude={"train", "eval", "chat_template", "too_long", "on_bad_row"})
    sources = [
        part.source.model_dump(mode="json", exclude={"path"}) | {"rows": part.rows.digest()} for part in read.parts
    ]
    backend = getattr(template.tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(template.tokenizer.get_vocab(), sort_keys=True)
    made = [options, longest, sources, template.jinja, sha256_bytes(vocabulary.encode())]
    return sha256_bytes(json.dumps(made).encode())


class Visits:
    """What became of streamed rows, as often as steps have read them."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._notes: dict[str, Note] = {}

    def add(self, counts: Counts, notes: Sequence[Note]) -> None:
        """Some more. A median of both is not known from theirs, and is 0."""
        longest = max(self.counts.longest, counts.longest)
        numbers = {
            name: value for name, value in asdict(counts).items() if name not in ("longest", "median", "streamed")
        }
        self.counts = replace(added(self.counts, [numbers]), longest=longest)
        for note in notes:
            before = self._notes.get(note.text, replace(note, rows=0, sources=()))
            sources = tuple(dict.fromkeys((*before.sources, *note.sources)))[:NAMED]
            self._notes[note.text] = replace(note, rows=before.rows + note.rows, sources=sources)

    def told(self) -> list[str]:
        """A few lines for people."""
        return [self.counts.line("train, as far as it was streamed"), *(note.line() for note in self._notes.values())]

    def state(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        return {
            "counts": asdict(self.counts),
            "notes": [{**asdict(n), "sources": list(n.sources)} for n in self._notes.values()],
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Visits":
        """From what `state` gave."""
        found = cls()
        found.counts = Counts(**state.get("counts", {}))
        notes = [Note(**{**values, "sources": tuple(values["sources"])}) for values in state.get("notes", ())]
        found._notes = {note.text: note for note in notes}
        return found
