"""What was read of the data and what became of it: counts, and notes that name the rows they are about."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from topwork.common.errors import DataError
from topwork.data.config import DataConfig
from topwork.data.conversations import BadRow

_SHOWN = 5  # bad rows named in a message
NAMED = 3
"""Rows named beside a note."""
REASONS = 5
"""Reasons for which bad rows are dropped that are told one by one."""


@dataclass(frozen=True)
class Counts:
    """What became of the rows on one side. `rows` are those read or, of held-out ones, those held out.

    bad_rows, duplicates         rows that are left out
    long                         sequences that were longer than allowed; what became of them:
    long_dropped, lost_answers   left out; of these, the ones that truncation left without any answer
    truncated, cut_answers       cut off; of these, the ones that end in the middle of an answer
    shortened, split             made of a shortened conversation; cut up into pieces
    sequences, tokens            what an epoch sees, rows of a source with a weight as often as it says
    streamed                     they are read as steps need them, so that only rows are counted
    """

    rows: int = 0
    bad_rows: int = 0
    duplicates: int = 0
    long: int = 0
    long_dropped: int = 0
    lost_answers: int = 0
    truncated: int = 0
    cut_answers: int = 0
    shortened: int = 0
    split: int = 0
    sequences: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0
    median: int = 0
    streamed: bool = False

    def line(self, name: str) -> str:
        """One line for people."""
        cut = f" ({self.cut_answers:,} in the middle of an answer)" if self.cut_answers else ""
        lost = [
            (self.bad_rows, "bad rows dropped"),
            (self.duplicates, "duplicates dropped"),
            (self.long_dropped - self.lost_answers, "too long and dropped"),
            (self.lost_answers, "lost their answer and were dropped"),
            (self.truncated, f"truncated{cut}"),
            (self.shortened, "shortened"),
            (self.split, "split"),
        ]
        notes = "".join(f", {number:,} {what}" for number, what in lost if number)
        if self.streamed:
            return (
                f"{name}: {self.rows:,} rows{notes}, streamed: an epoch reads {self.sequences:,}, and one that is too "
                "long, or that the chat template refuses, is found when a step needs it"
            )
        median = f"median {self.median}, " if self.median else ""
        sizes = f"{self.tokens:,} tokens, {self.learned_tokens:,} learned; {median}longest {self.longest}"
        rows, sequences = (
            f"{number:,} {what}{'' if number == 1 else 's'}"
            for number, what in ((self.rows, "row"), (self.sequences, "sequence"))
        )
        return f"{name}: {rows} -> {sequences}{notes}; {sizes}"


@dataclass(frozen=True)
class Note:
    """Something that holds for `rows` rows, or for the data as a whole (0).

    text     what, in words that are the same for rows of a kind
    sources  the first of the rows
    dropped  they are left out for it
    warning  it is likely a mistake
    """

    text: str
    rows: int = 0
    sources: tuple[str, ...] = ()
    dropped: bool = False
    warning: bool = False

    def line(self) -> str:
        """`12 rows: a user turn at the end is cut (train.jsonl:3, train.jsonl:9, …)`"""
        count = f"{self.rows:,} {'row' if self.rows == 1 else 'rows'}{' dropped' if self.dropped else ''}: "
        more = ", …" if self.rows > len(self.sources) else ""
        named = f" ({', '.join(self.sources)}{more})" if self.sources else ""
        return f"{'warning: ' if self.warning else ''}{count if self.rows else ''}{self.text}{named}"


WARNING = "warning: "
"""How reading begins a remark on files that is more than one."""


def file_notes(remarks: Iterable[str]) -> list[Note]:
    """What was noticed in files, each once."""
    return [
        Note(text.removeprefix(WARNING), warning=text.startswith(WARNING)) for text in dict.fromkeys(remarks)
    ]  # fmt: skip


class Tally:
    """Counts rows by what is said of them, and remembers the first of each."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._first: dict[str, list[str]] = {}

    def add(self, texts: Iterable[str], source: str) -> None:
        """One row, and everything that is to be said of it."""
        for text in dict.fromkeys(texts):
            self._rows[text] = self._rows.get(text, 0) + 1
            named = self._first.setdefault(text, [])
            if len(named) < NAMED:
                named.append(source)

    def notes(self, dropped: bool = False, warning: bool = False) -> list[Note]:
        """A note for each text, in the order in which they came up."""
        return [
            Note(text, rows, tuple(self._first[text]), dropped, warning) for text, rows in self._rows.items()
        ]  # fmt: skip


def dropped_notes(bad: Sequence[BadRow]) -> list[Note]:
    """Why rows were dropped: the commonest reasons each, the others together."""
    tally = Tally()
    for row in bad:
        tally.add([row.reason], row.source)
    notes = sorted(tally.notes(dropped=True), key=lambda note: -note.rows)
    told, others = notes[:REASONS], notes[REASONS:]
    if others:
        rest = Note("for other reasons", sum(note.rows for note in others), others[0].sources[:1], dropped=True)
        told.append(rest)
    return told


@dataclass(frozen=True)
class DataSummary:
    """What was read and what became of it.

    sentences          how each source was read
    held_out           whether `eval` was held out of the training rows
    duplicates_across  eval sequences that stand, token for token, in train
    prompts_across     eval rows whose prompt stands in train with another answer
    notes              what was changed, left out or looks wrong, with the rows it is about
    """

    sentences: tuple[str, ...]
    train: Counts
    eval: Counts
    held_out: bool
    duplicates_across: int
    prompts_across: int = 0
    notes: tuple[Note, ...] = field(default=())

    @property
    def recognised(self) -> str:
        """How all sources were read, in one line."""
        return "; ".join(self.sentences)

    @property
    def sides(self) -> dict[str, Counts]:
        """The counts by how people call them."""
        held = " (held out by seed)" if self.held_out else ""
        return {"train": self.train, **({f"eval{held}": self.eval} if self.eval.rows else {})}

    def told(self) -> list[Note]:
        """The notes, and what is on both sides."""
        across = []
        if self.duplicates_across:
            number = f"{self.duplicates_across:,} of {self.eval.sequences:,}"
            text = f"{number} eval sequences are in train too, so validation is that much too kind"
            across.append(Note(text, warning=True))
        if self.prompts_across:
            number = f"{self.prompts_across:,} of {self.eval.rows:,}"
            across.append(
                Note(f"{number} eval rows have a prompt that is in train too, with another answer", warning=True)
            )
        return [*self.notes, *across]

    def lines(self) -> list[str]:
        """A few lines for people."""
        counts = [counts.line(name) for name, counts in self.sides.items()]
        return [*self.sentences, *counts, *(note.line() for note in self.told())]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def added(first: Counts, fates: Iterable[Mapping[str, int]]) -> Counts:
    """Counts with what became of single rows added."""
    totals = {each.name: getattr(first, each.name) for each in fields(first)}
    for fate in fates:
        for name, number in fate.items():
            totals[name] += number
    return Counts(**totals)


def refuse_bad(bad: Sequence[BadRow], count: int, config: DataConfig) -> None:
    """Raises DataError naming the first bad rows and their number, unless the recipe says to drop them."""
    if not bad or config.on_bad_row == "drop":
        return
    named = "\n".join(f"  {row.source}: {row.reason}" for row in bad[:_SHOWN])
    more = f"\n  … and {len(bad) - _SHOWN:,} more" if len(bad) > _SHOWN else ""
    raise DataError(
        f"{len(bad):,} of {count:,} rows cannot be used:\n{named}{more}\n"
        "Correct them, or set data.on_bad_row: drop to leave them out"
    )
