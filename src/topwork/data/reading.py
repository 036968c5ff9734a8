"""What the sources of one side hold, as sequences that fit: which rows are copies, and which are held out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from topwork.data.chat.template import ChatTemplate, Encoded
from topwork.data.config import DataConfig, SourceConfig, Sources
from topwork.data.conversations import BadRow, Conversation
from topwork.data.fitting import Fitted, Fitting
from topwork.data.meaning.formats import Format
from topwork.data.parts import Formats, read_parts
from topwork.data.splitting import hold_out, no_such_column, prompt_key, repeats, units
from topwork.data.summary import NAMED, Note, Tally, dropped_notes, file_notes, refuse_bad

_CHUNK = 1000  # rows that are texts and lists of ids at the same time
Arrays = tuple[np.ndarray, np.ndarray]
"""A sequence: tokens [T] int32 and weights [T] float32."""


@dataclass(slots=True)
class FittedRow:
    """What a row says, and the sequences that are left of it: none where it cannot be used or is left out.

    fates   what became of its sequences, by the names of `Counts`
    source  the number of its source
    """

    conversation: Conversation
    sequences: tuple[Arrays, ...]
    fates: Mapping[str, int]
    source: int


@dataclass
class Read:
    """What the sources of one side hold.

    rows   that became conversations, in their order
    bad    the others, and those of `rows` that the template cannot write
    count  of all
    """

    sources: list[SourceConfig]
    formats: list[Format]
    rows: list[FittedRow]
    bad: list[BadRow]
    count: int
    notes: list[Note]

    @property
    def ways(self) -> Formats:
        """How each source was read."""
        return list(zip(self.sources, self.formats))


def read_side(
    config: DataConfig, named: Sources, template: ChatTemplate, max_length: int, max_rows: int | None = None
) -> Read:
    """The rows of all sources, encoded and made to fit. Raises DataError for bad ones unless the recipe drops them."""
    parts = read_parts(config, named, max_rows)
    bad = [row for part in parts for row in part.bad]
    found = Read([part.source for part in parts], [part.format for part in parts], [], bad, 0, [])
    for part in parts:
        found.count += len(part.rows)
        found.notes += file_notes(part.notes)
    refuse_bad(bad, found.count, config)
    waiting = [part.conversations for part in parts]
    del parts  # the rows as they were read, which nobody needs any more
    template.survey([row for conversations in waiting for row in conversations])
    fitting, tally = Fitting(config, template, max_length), Tally()
    for number, conversations in enumerate(waiting):
        for start in range(0, len(conversations), _CHUNK):
            fitted, unusable = encoded(conversations[start : start + _CHUNK], config, template, fitting)
            bad += unusable
            for row in fitted:
                tally.add(row.notes, row.conversation.source)
                sequences = tuple(map(arrays, row.sequences))
                found.rows.append(FittedRow(row.conversation, sequences, row.fates, number))
    refuse_bad(bad, found.count, config)
    fitting.check()
    found.notes += [*dropped_notes(bad), *tally.notes()]
    return found


def encoded(
    rows: Sequence[Conversation], config: DataConfig, template: ChatTemplate, fitting: Fitting
) -> tuple[list[Fitted], list[BadRow]]:
    """Rows as sequences that fit, with everything that is to be said of each, and those that cannot be used."""
    encodings, bad = template.encode_all(rows, config.train_on)
    usable = []
    for row, items in zip(rows, encodings):
        learned = [item for item in items if any(item.weights)]
        if items and not learned:
            bad.append(BadRow(row.source, "nothing to learn: it is a single token"))
        usable.append((row, learned))
    found = []
    for fitted, (row, items) in zip(fitting.fit(usable), usable):
        said = (*row.notes, *(note for item in items for note in item.notes)) if items else ()
        found.append(replace(fitted, notes=(*said, *fitted.notes)) if said else fitted)
    return found, bad


def arrays(item: Encoded) -> Arrays:
    """A sequence as it is kept."""
    return np.asarray(item.tokens, dtype=np.int32), np.asarray(item.weights, dtype=np.float32)


def without_copies(rows: Sequence[FittedRow], config: DataConfig) -> list[Note]:
    """Rows that are learned the same as an earlier one, told, or left out where the recipe says so."""
    copies = repeats([_digest(row.sequences) for row in rows])
    if not copies:
        return []
    named = tuple(rows[number].conversation.source for number in copies[:NAMED])
    if config.duplicates == "keep":
        text = "the same, token for token, as an earlier one; data.duplicates: drop keeps the first alone"
        return [Note(text, len(copies), named, warning=True)]
    for number in copies:
        rows[number].sequences, rows[number].fates = (), {"duplicates": 1}
    return [Note("the same, token for token, as an earlier one", len(copies), named, dropped=True)]


def _digest(sequences: Sequence[Arrays]) -> bytes | None:
    """The same for rows of which the same is learned, with the same weights; None where nothing is."""
    if not sequences:
        return None
    digest = blake2b(digest_size=16)
    for tokens, weights in sequences:
        digest.update(len(tokens).to_bytes(8, "big"))
        digest.update(tokens.tobytes())
        digest.update(weights.tobytes())
    return digest.digest()


def held_out(read: Read, config: DataConfig, seed: int) -> tuple[Read, Read, Sequence[Note]]:
    """The rows in their order, less a share drawn by seed, and that share."""
    by = config.hold_out_by
    if (
        by not in ("prompt", "row")
        and config.eval_fraction
        and all(row.conversation.group is None for row in read.rows)
    ):
        raise no_such_column(by)
    usable = [bool(row.sequences) for row in read.rows]
    keys = units([row.conversation for row in read.rows], by)
    held = hold_out(keys, usable, config.eval_fraction, seed, by)
    kept = [row for number, row in enumerate(read.rows) if number not in held.rows]
    out = [row for number, row in enumerate(read.rows) if number in held.rows]
    return (
        replace(read, rows=kept, count=read.count - len(out)),
        replace(read, rows=out, bad=[], count=len(out)),
        held.notes,
    )


def across(train: Sequence[FittedRow], evaluation: Sequence[FittedRow]) -> tuple[int, int]:
    """How many eval sequences stand, token for token, in train; how many other eval rows have a prompt from there."""
    if not evaluation:
        return 0, 0
    seen = {tokens.tobytes() for row in train for tokens, _ in row.sequences}
    prompts = {prompt_key(row.conversation) for row in train if row.sequences}
    both = [[tokens.tobytes() in seen for tokens, _ in row.sequences] for row in evaluation]
    others = (row for row, here in zip(evaluation, both) if here and not all(here))
    return sum(map(sum, both)), sum(prompt_key(row.conversation) in prompts for row in others)
