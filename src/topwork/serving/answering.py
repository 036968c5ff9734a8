"""One request in the engine: tokens as they come, each choice's as text, until each has ended."""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from topwork.generation.requests import Event
from topwork.generation.text import TextStream
from topwork.serving.errors import ApiError
from topwork.serving.worker import Admitted, Worker

LEAST_LOGPROB = -9999.0
"""In the place of minus infinity, which JSON has not."""


@dataclass(frozen=True)
class Scored:
    """A token, its log-probability, and the likeliest in its place."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass
class Piece:
    """What one choice got since the last one: text that may be shown, the tokens of it, and how it ended."""

    choice: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    ended: str | None = None
    """stop, length; None while it goes on. Whoever takes the piece may set it, and the choice ends with it."""


class Answering:
    """The choices of one admitted request. `aclose` of `pieces` gives up what still runs."""

    def __init__(
        self, worker: Worker, admitted: Admitted, texts: Sequence[TextStream],
        counted: Callable[[int, float | None], None],
    ) -> None:  # fmt: skip
        """`counted(choice, began)` is told each token that counts (those after a stop string do not), and with the
        first of a choice when its prompt began to be read."""
        self.worker, self.admitted, self.texts, self.counted = worker, admitted, texts, counted
        self._going = set(range(len(texts)))

    def end(self) -> None:
        """Give up what still runs."""
        if self._going:
            self.worker.give_up(self.admitted)
            self._going.clear()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """All of all choices, in the order that they came. Raises ApiError where the engine failed."""
        try:
            while self._going:
                brought: dict[int, Piece] = {}
                for choice, event in await self.admitted.inbox.take():
                    if choice in self._going:
                        piece = brought.setdefault(choice, Piece(choice))
                        self._take(piece, event)
                        if piece.ended is not None:
                            self._going.discard(choice)
                stopped = [piece.choice for piece in brought.values() if self.texts[piece.choice].stopped is not None]
                if stopped:
                    self.worker.give_up(self.admitted, stopped)
                for piece in brought.values():
                    yield piece
                    if piece.ended is not None and piece.choice in self._going:
                        self._going.discard(piece.choice)
                        self.worker.give_up(self.admitted, [piece.choice])
        finally:
            self.end()

    def _take(self, piece: Piece, event: Event) -> None:
        stream = self.texts[piece.choice]
        if event.token is not None:
            self.counted(piece.choice, event.began)
            piece.tokens.append(event.token)
            if event.logprob is not None:
                likeliest = tuple((token, _finite(logprob)) for token, logprob in event.likeliest)
                piece.scored.append(Scored(event.token, _finite(event.logprob), likeliest))
            piece.text += stream.add(event.token)
        if stream.stopped is not None:
            piece.ended = "stop"
        elif event.ended in ("stop", "length"):
            piece.text += stream.finish()
            piece.ended = "stop" if stream.stopped is not None else event.ended
        elif event.ended is not None:
            raise ApiError(500, event.error or "the answer was broken off", code="generation_failed")


def _finite(logprob: float) -> float:
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """OpenAI's."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
