"""Real rows as the model will see them, token by token."""

import codecs
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
    texts = [stream.add(tokens[number]) for number in at]
    rest = stream.finish()
    if rest and texts:
        texts[-1] += rest
    if not pieces_of(tokenizer).byte_level:
        _put_bytes_in_place(tokenizer, [tokens[number] for number in at], texts)
    return [
        Piece(tokens[number], text, weights[number], tokens[number] in special, number >= cut)
        for number, text in zip(at, texts)
    ]


def _put_bytes_in_place(tokenizer: Any, tokens: Sequence[int], texts: list[str]) -> None:
    """Letters of tokens that are bytes were held back until the next token; each goes where its last byte is, or a line
    break before an answer would look learned."""
    pieces, run = pieces_of(tokenizer), list[int]()
    for number, token in enumerate(tokens):
        is_byte, text = pieces.is_byte(token), texts[number]
        run += [number] if is_byte else []
        if not text or not run:
            continue
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        letters = [decoder.decode(pieces.bytes_of(tokens[each])) for each in run]
        said = "".join(letters)
        if text.startswith(said) and (not is_byte or text == said):
            texts[number] = "" if is_byte else text[len(said) :]
            for each, letter in zip(run, letters):
                texts[each] = letter
        run = []
