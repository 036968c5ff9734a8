"""Which tokens are learned: rendered turns and documents as token ids and weights.

A conversation of a thousand turns is rendered a thousand times, each text a little longer than the last. Only what is
new is tokenized: from the last special token on that stands in the text before, since what follows such a token is
tokenized without regard to what precedes it (`Tokens.joint`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from topwork.data.chat.markup import Tokens
from topwork.data.conversations import RowProblem

Ids = Mapping[str, list[int]]


@dataclass(frozen=True)
class Encoded:
    """A sequence. weights[i] is the weight with which tokens[i] is learned from tokens[:i]; weights[0] is 0.

    notes  what of the conversation the template left out, as `Conversation.notes`
    """

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A text to be tokenized. One that `joins` begins with the last special token of the text before, in whose place
    its ids are put; any other is the whole."""

    text: str
    joins: bool = False


@dataclass(frozen=True)
class Turn:
    """One learned answer: what generation is prompted with, and the same through the end of the turn.

    answer  through, less prompt
    ends    whether markup ends it, by which generation can stop
    whole   the text of `through`, where it is to be proved that its pieces make its ids
    """

    prompt: Piece
    through: Piece
    answer: str
    ends: bool
    weight: float
    whole: str | None = None


@dataclass(frozen=True)
class Whole:
    """A conversation of which everything is learned: its beginnings through each message, and their weights."""

    upto: tuple[Piece, ...]
    weights: tuple[float, ...]
    ends: bool


@dataclass(frozen=True)
class Document:
    """Plain text, as `Tokens.document` has it. `learned` are stretches of `text`, in its letters; None is all."""

    text: str
    begins: bool
    ends: bool
    learned: tuple[tuple[int, int], ...] | None = None
    raw: str = ""
    letters: bool = True


class Pieces:
    """Cuts texts, each of which may go on with the one before."""

    def __init__(self, tokens: Tokens) -> None:
        self._joint: Callable[[str], int] = tokens.joint
        self._known, self._at = "", -1

    def after(self, text: str) -> Piece:
        """What of it is to be tokenized."""
        joins = self._at >= 0 and text.startswith(self._known)
        piece = Piece(text[self._at :], True) if joins else Piece(text)
        found = self._joint(piece.text)
        self._at = found + (self._at if joins else 0) if found >= 0 else -1
        self._known = text
        return piece


def texts_of(part: Turn | Whole | Document) -> Iterable[str]:
    """What is to be tokenized of it."""
    if isinstance(part, Turn):
        return (part.prompt.text, part.through.text, *([part.whole] if part.whole is not None else []))
    return tuple(piece.text for piece in part.upto) if isinstance(part, Whole) else (part.text,)


def joined(known: list[int], piece: Piece, ids: Ids) -> list[int]:
    """The ids of a whole text from those of the text before it."""
    new = ids[piece.text]
    if not piece.joins:
        return new
    start = len(known) - 1
    while known[start] != new[0]:
        start -= 1
    return known[:start] + new


def of_turns(turns: Sequence[Turn], ids: Ids, tokens: Tokens, eos: Callable[[], int]) -> list[Encoded]:
    """One sequence, or several where what generation is prompted with does not go on with the sequence before."""
    sequences: list[Encoded] = []
    through: list[int] = []
    for turn in turns:
        prompt = joined(through, turn.prompt, ids)
        through = joined(prompt, turn.through, ids)
        if through[: len(prompt)] == prompt:
            answer = through[len(prompt) :]
        else:  # the answer's first letters would merge with the prompt's last
            answer = tokens.ids_after(turn.answer)
        if turn.ends:
            tokens.check_ended(answer, turn.answer)
        else:
            answer = [*answer, eos()]
        if not sequences or prompt[: len(sequences[-1].tokens)] != sequences[-1].tokens:
            sequences.append(Encoded())
        known, weights = sequences[-1].tokens, sequences[-1].weights
        new = prompt[len(known) :]
        known += new + answer
        weights += [0.0] * len(new) + [turn.weight] * len(answer)
    return [_first_unlearned(sequence) for sequence in sequences]


def holds(turns: Sequence[Turn], ids: Ids) -> bool:
    """Whether pieces made the ids of the whole, where the whole is at hand."""
    through: list[int] = []
    for turn in turns:
        through = joined(joined(through, turn.prompt, ids), turn.through, ids)
        if turn.whole is not None and through != ids[turn.whole]:
            return False
    return True


def of_whole(whole: Whole, ids: Ids, tokens_of: Tokens, eos: Callable[[], int]) -> Encoded:
    """Every token with the weight of the message that it is in."""
    upto: list[list[int]] = []
    for piece in whole.upto:
        upto.append(joined(upto[-1] if upto else [], piece, ids))
    tokens = list(upto[-1])
    weights, start = [1.0] * len(tokens), 0
    for known, weight in zip(upto, whole.weights):
        stop = max(start, _shared(known, tokens))
        weights[start:stop] = [weight] * (stop - start)
        start = stop
    if whole.ends:
        tokens_of.check_ended(tokens, whole.upto[-1].text)
    else:
        tokens, weights = [*tokens, eos()], [*weights, whole.weights[-1]]
    return _first_unlearned(Encoded(tokens, weights))


def of_document(document: Document, ids: Ids, tokens: Tokens, bos: int | None, eos: Callable[[], int]) -> Encoded:
    """Every token, or those that lie wholly in what is to be learned; BOS and EOS where they are not there."""
    found = ids[document.text]
    weights = [1.0] * len(found)
    last = 1.0
    if document.learned is not None:
        found, weights = _within(document, found, tokens)
        last = 1.0 if document.learned[-1][1] == len(document.raw) else 0.0
    if not document.begins and bos is not None:
        found, weights = [bos, *found], [0.0, *weights]
    if document.ends:
        tokens.check_ended(found, document.text)
    else:
        found, weights = [*found, eos()], [*weights, last]
    return _first_unlearned(Encoded(list(found), weights))


def _within(document: Document, known: list[int], tokens: Tokens) -> tuple[list[int], list[float]]:
    """A token across the beginning of what is learned belongs to the prompt, and one across its end to what follows."""
    assert document.learned is not None
    placed = tokens.with_places(document.raw, document.letters)
    if placed is None:
        weights = [0.0] * len(known)
        for start, stop in document.learned:
            first, last = (_shared(tokens.ids([document.raw[:at]])[0], known) for at in (start, stop))
            weights[first:last] = [1.0] * (last - first)
        return known, weights
    found, places = placed
    learned = [any(start <= a and b <= stop for start, stop in document.learned) for a, b in places]
    return found, [float(each) for each in learned]


def learned_parts(text: str, response: str, instruction: str | None) -> tuple[tuple[int, int], ...]:
    """What stands between each `response` and the next `instruction`. Raises RowProblem where that is nothing."""
    found: list[tuple[int, int]] = []
    at = text.find(response)
    while at >= 0:
        start = at + len(response)
        stop = text.find(instruction, start) if instruction else -1
        stop = stop if stop >= 0 else len(text)
        if response in text[start:stop]:
            raise RowProblem(
                f"{response!r} stands twice with no data.instruction_part between, so what it is that answers is not "
                "known; set data.instruction_part to what begins a question"
            )
        if text[start:stop].strip():
            found.append((start, stop))
        at = text.find(response, stop)
    if not found:
        raise RowProblem(f"nothing to learn: the text has no {response!r} (data.response_part) with an answer after it")
    return tuple(found)


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


def shared(first: str, second: str) -> int:
    """The length of the common beginning."""
    return _shared(first, second)


def _first_unlearned(sequence: Encoded) -> Encoded:
    """Nothing stands before the first token from which it could be learned."""
    if sequence.weights:
        sequence.weights[0] = 0.0
    return sequence
