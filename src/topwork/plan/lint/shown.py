"""Real rows as the model will see them, token by token."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topwork.common.errors import RequestError, did_you_mean
from topwork.generation.text import TextStream, pieces_of
from topwork.plan.lint.examined import Examined, Side

HEAD, TAIL = 1200, 400
"""Tokens that are shown of a longer sequence, at its beginning and at its end."""


@dataclass(frozen=True)
class Piece:
    """One token. A part of a letter has no text; the token that completes it has.

    weight   with which it is learned; 0 is not
    special  it is one of the tokens that no ordinary text becomes
    cut      it lies beyond `data.max_length`, where `data.too_long` cuts off
    """

    id: int
    text: str
    weight: float
    special: bool
    cut: bool


@dataclass(frozen=True)
class ShownRow:
    """A sequence. `left_out` tokens stand, not shown, after the first `head` pieces."""

    source: str
    side: str
    length: int
    learned: int
    pieces: tuple[Piece, ...]
    head: int
    left_out: int

    @property
    def marked(self) -> str:
        """Its text, what is learned in ⟦ ⟧."""
        text, open_ = "", False
        for number, piece in enumerate(self.pieces):
            learned = piece.weight > 0 and not piece.cut
            if self.left_out and number == self.head:
                text += "⟧" * open_ + f" … {self.left_out:,} tokens … "
                open_ = False
            if learned != open_:
                text += "⟦" if learned else "⟧"
                open_ = learned
            text += piece.text
        return text + "⟧" * open_


def shown_rows(examined: Examined, wanted: int | Sequence[str]) -> list[ShownRow]:
    """So many rows of the training set, spread over it: the first, the last, the shortest, the longest, and others that
    the recipe's seed draws; or those of the given sources. Raises RequestError for a source that is not there."""
    if isinstance(wanted, int):
        side = examined.train
        return [_shown(examined, side, number) for number in _spread(side, wanted, examined.recipe.training.seed)]
    found = []
    for source in wanted:
        found += _of_source(examined, source)
    return found


def _spread(side: Side, count: int, seed: int) -> list[int]:
    """Numbers of sequences, in their order."""
    total, lengths = len(side.sequences), side.sequences.lengths
    if not total or count < 1:
        return []
    chosen = dict.fromkeys([0, total - 1, int(lengths.argmin()), int(lengths.argmax())])
    others = random.Random(seed).sample(range(total), min(total, count + 4))
    return sorted(list(chosen | dict.fromkeys(others))[:count])


def _of_source(examined: Examined, source: str) -> list[ShownRow]:
    for side in examined.sides:
        rows = [number for number, row in enumerate(side.conversations) if row.source == source]
        if rows:
            sequences = np.flatnonzero(np.isin(side.sequences.rows, rows))
            return [_shown(examined, side, int(number)) for number in sequences]
        bad = next((row for row in side.bad if row.source == source), None)
        if bad is not None:
            raise RequestError(f"{source} cannot be shown, because it cannot be used: {bad.reason}")
    names = [row.source for side in examined.sides for row in side.conversations[:20_000]]
    raise RequestError(f"--rows names {source!r}, which no row is called{did_you_mean(source, names[:2000])}")


def _shown(examined: Examined, side: Side, number: int) -> ShownRow:
    found, row = side.sequences, int(side.sequences.rows[number])
    start, stop = int(found.bounds[number]), int(found.bounds[number + 1])
    tokens, weights = found.tokens[start:stop].tolist(), found.weights[start:stop].tolist()
    cut = examined.limit if examined.recipe.data.too_long == "truncate" else len(tokens)
    left_out = max(0, len(tokens) - HEAD - TAIL)
    if left_out:
        halves = (range(HEAD), range(len(tokens) - TAIL, len(tokens)))
    else:
        halves = (range(len(tokens)), range(0))
    pieces = [piece for half in halves for piece in _pieces(examined.tokenizer, half, tokens, weights, cut)]
    learned = int(np.count_nonzero(found.learned[start:stop]))
    return ShownRow(
        side.conversations[row].source, side.name, len(tokens), learned, tuple(pieces), len(halves[0]), left_out
    )  # fmt: skip


def _pieces(tokenizer: Any, at: range, tokens: list[int], weights: list[float], cut: int) -> list[Piece]:
    special = pieces_of(tokenizer).special
    stream = TextStream(tokenizer, shown=special)
    found = [
        Piece(tokens[number], stream.add(tokens[number]), weights[number], tokens[number] in special, number >= cut)
        for number in at
    ]
    rest = stream.finish()
    if rest and found:
        last = found[-1]
        found[-1] = Piece(last.id, last.text + rest, last.weight, last.special, last.cut)
    return found
