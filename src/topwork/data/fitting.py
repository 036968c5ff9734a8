"""Sequences of at most so many tokens: longer ones are refused, cut, left out, or made of a shortened conversation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from topwork.common.errors import DataError
from topwork.data.chat.template import ChatTemplate, Encoded
from topwork.data.config import DataConfig
from topwork.data.conversations import Conversation
from topwork.data.shortening import Made, alone, shorten


@dataclass(frozen=True)
class Fitted:
    """One row after its sequences were made to fit.

    sequences     what is left to learn, in the row's order; each has something to learn
    conversation  what the sequences were made of: shortened where they were
    fates         how many of the row's sequences became what, by the names of `Counts`
    notes         the same in words, as `Conversation.notes`
    """

    sequences: list[Encoded]
    conversation: Conversation
    fates: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


_SHORTER = {
    # what is said of a row that was shortened, and of one that could not be
    "oldest_turns": (
        "the oldest turns are left out",
        "one exchange alone is too long, so it is dropped with its answer (data.too_long: middle shortens it)",
    ),
    "middle": (
        "the middle of a long message is left out",
        "too long even with its messages shortened, so it is dropped",
    ),
}


class Fitting:
    """Makes rows fit by `data.too_long`, some at a time, and remembers what `check` has to refuse."""

    def __init__(self, config: DataConfig, template: ChatTemplate, max_length: int) -> None:
        self.config, self.template, self.max_length = config, template, max_length
        self._refused: list[tuple[int, str, str]] = []  # length, source and kind
        self._sequences = 0

    def fit(self, rows: Sequence[tuple[Conversation, list[Encoded]]]) -> list[Fitted]:
        """Each row as what fits of it, in their order."""
        self._sequences += sum(len(items) for _, items in rows)
        found = [self._plainly(row, items) for row, items in rows]
        waiting = [number for number, fitted in enumerate(found) if fitted is None]
        for number, fitted in zip(waiting, self._shortened([rows[number] for number in waiting])):
            found[number] = fitted
        return [fitted for fitted in found if fitted is not None]

    def check(self) -> None:
        """Raises DataError where rows were too long for the recipe."""
        if not self._refused:
            return
        (longest, source, _), maximum = max(self._refused), self.max_length
        own = maximum == self.config.max_length
        bound = "data.max_length" if own else "the model's context, below data.max_length,"
        talks = any(kind == "chat" for _, _, kind in self._refused)
        way = self.config.too_long
        why = "" if way == "refuse" else f"They are plain text, and data.too_long is {way}, which shortens talks. "
        ways = (
            "oldest_turns or middle (which keep answers whole), truncate (their ends are not learned) or drop"
            if talks
            else "split (which cuts them up), truncate (their ends are not learned) or drop"
        )
        raise DataError(
            f"{len(self._refused):,} of {self._sequences:,} sequences are longer than {maximum:,} tokens ({bound} is "
            f"{maximum:,}); the longest has {longest:,} ({source}). {why}Set "
            f"{f'data.max_length: {longest} or more, or ' if own else ''}data.too_long: {ways}"
        )

    def _plainly(self, row: Conversation, items: list[Encoded]) -> Fitted | None:
        """A row that fits, or whose sequences are cut without a look at the conversation; None for another."""
        long = [item for item in items if len(item.tokens) > self.max_length]
        if not long:
            return Fitted(items, row)
        way, fates = self.config.too_long, {"long": len(long)}
        if way == "refuse" or (way in _SHORTER and row.kind == "text"):
            self._refused += [(len(item.tokens), row.source, row.kind) for item in long]
            return Fitted([item for item in items if len(item.tokens) <= self.max_length], row, fates)
        if way == "split":
            pieces = [piece for item in items for piece in _pieces(item, self.max_length)]
            note = f"cut up into pieces of at most {self.max_length:,} tokens"
            return Fitted(pieces, row, fates | {"split": len(long)}, (note,))
        if way == "drop":
            left = [item for item in items if len(item.tokens) <= self.max_length]
            note = f"longer than {self.max_length:,} tokens, and dropped"
            return Fitted(left, row, fates | {"long_dropped": len(long)}, (note,))
        return self._truncated(row, items) if way == "truncate" else None

    def _truncated(self, row: Conversation, items: Sequence[Encoded]) -> Fitted:
        """Sequences cut off at their ends; one that has nothing to learn then is left out."""
        maximum = self.max_length
        fates = dict.fromkeys(("long", "truncated", "cut_answers", "lost_answers", "long_dropped"), 0)
        left, notes = [], []
        for item in items:
            if len(item.tokens) <= maximum:
                left.append(item)
                continue
            fates["long"] += 1
            start = replace(item, tokens=item.tokens[:maximum], weights=item.weights[:maximum])
            if not any(start.weights):
                fates["lost_answers"] += 1
                fates["long_dropped"] += 1
                notes.append(f"the answer begins after {maximum:,} tokens and is lost, so the sequence is dropped")
                continue
            left.append(start)
            fates["truncated"] += 1
            inside = bool(start.weights[-1] and item.weights[maximum])
            fates["cut_answers"] += inside and row.kind == "chat"
            lost = (
                ", in the middle of an answer"
                if inside
                else ", with later answers"
                if any(item.weights[maximum:])
                else ""
            )
            notes.append(f"cut off after {maximum:,} tokens{lost if row.kind == 'chat' else ''}")
        return Fitted(left, row, fates, tuple(notes))

    def _shortened(self, rows: Sequence[tuple[Conversation, list[Encoded]]]) -> list[Fitted]:
        """Rows of which some sequences are made anew, of shortened conversations; all are tried side by side."""
        way = self.config.too_long
        if way != "oldest_turns" and way != "middle":
            return []
        parts = [alone(row, items, self.config.train_on) for row, items in rows]
        long = [part for own in parts for part in own if part.longest > self.max_length]
        made = iter(shorten(long, way, self.template, self.config.train_on, self.max_length))
        return [
            self._joined(row, items, [next(made) if part.longest > self.max_length else [part] for part in own])
            for (row, items), own in zip(rows, parts)
        ]

    def _joined(self, row: Conversation, items: Sequence[Encoded], parts: Sequence[Sequence[Made]]) -> Fitted:
        """The parts of one row as one again."""
        kept = [made for part in parts for made in part if made.sequences]
        sequences = [item for made in kept for item in made.sequences]
        same = {id(item) for item in items}
        shorter = sum(id(item) not in same for item in sequences)
        dropped = sum(not made.sequences for part in parts for made in part)
        told, failed = _SHORTER[self.config.too_long]
        long = sum(len(item.tokens) > self.max_length for item in items)
        fates = {"long": long, "shortened": shorter, "long_dropped": dropped}
        notes = ((told,) if shorter else ()) + ((failed,) if dropped else ())
        return Fitted(sequences, kept[-1].conversation if kept else row, fates, notes)


def _pieces(item: Encoded, max_length: int) -> list[Encoded]:
    """Pieces that overlap by one token, from which the next piece's first is learned: every token is learned once.
    Pieces of which nothing is learned are left out."""
    pieces = []
    for start in range(0, len(item.tokens) - 1, max_length - 1):
        stop = start + max_length
        pieces.append(replace(item, tokens=item.tokens[start:stop], weights=[0.0, *item.weights[start + 1 : stop]]))
    return [piece for piece in pieces if any(piece.weights)]
