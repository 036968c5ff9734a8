"""One request's record, and who is told of it as it goes: its gate, its meter, its client."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Any, Self

from starlette.requests import Request
from starlette.types import Receive

from topwork.serving.backends.backend import Chunks, Refused
from topwork.serving.errors import ApiError
from topwork.serving.seams import Call, Parts
from topwork.serving.streams import ClientGone, Run

GONE = 499
"""nginx's status for a client that did not wait; in records alone, since nobody reads it."""


class Way:
    """What a record goes through. `ended` may be called again, and does nothing then."""

    def __init__(self, parts: Parts, record: Call, request: Request, seconds: float, running: set[Run]) -> None:
        self.parts, self.record, self.request = parts, record, request
        self._seconds, self._running = seconds, running
        self._entered = self._over = False
        self._last: dict[int, float] = {}

    def run(self, receive: Receive) -> Run:
        """The time that the request has left."""
        return Run(receive, self._seconds - (monotonic() - self.record.arrived_at), self._running)

    def enter(self) -> None:
        """Its limits, then the figures. Raises ApiError (429)."""
        self.parts.gate.enter(self.record)
        self._entered = True
        self.parts.meter.began(self.record)

    def version(self, content: str) -> None:
        """Which version of its adapter it was given."""
        self.record.version = content

    def token(self, choice: int, began: float | None = None) -> None:
        """A token of it came that counts; `began`: when its prompt began to be read."""
        now = monotonic()
        self.record.started_at = self.record.started_at or began
        since = self._last.get(choice, self.record.arrived_at)
        self._last[choice] = self.record.last_token_at = now
        self.record.first_token_at = self.record.first_token_at or now
        self.record.generated_tokens += 1
        self.parts.meter.token(self.record, now - since)

    def told(self, said: Mapping[str, Any]) -> None:
        """A chunk or the whole went out: what it cost, and how its choices ended."""
        usage = said.get("usage")
        if usage:
            self.record.prompt_tokens = usage["prompt_tokens"]
            self.record.generated_tokens = usage["completion_tokens"]
            self.record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self.record.finish += [reason for choice in said["choices"] if (reason := choice.get("finish_reason"))]
        if self.record.first_token_at is None and said["choices"]:  # a back end that does not tell its tokens
            self.record.first_token_at = monotonic()

    def ended(self, error: BaseException | None) -> None:
        """It is over."""
        if self._over:
            return
        self._over = True
        record = self.record
        record.ended_at = monotonic()
        if error is not None:
            record.status = error.status if isinstance(error, ApiError) else GONE if _gone(error) else 500
            record.error = (error.code or error.type) if isinstance(error, ApiError) else type(error).__name__
            lacking = max(0, record.choices - len(record.finish)) if self._entered else 0
            record.finish += ["cancelled" if _gone(error) else "failed"] * lacking
        if self._entered:
            self.parts.gate.leave(record)
        self.parts.meter.ended(record)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Until its head is out: an error ends it."""
        try:
            yield
        except Refused as refused:
            error = as_api_error(refused)
            self.ended(error)
            raise error from refused
        except BaseException as error:
            self.ended(error)
            raise

    def headers(self) -> dict[str, str]:
        """What the answer's head says."""
        found = dict(self.parts.gate.headers(self.record.caller))
        if self.record.target.arm is not None:
            found["x-topwork-arm"] = self.record.target.arm
        if self.record.version:
            found["x-topwork-version"] = self.record.version
        return found


class Watched:
    """Chunks on their way out, which are told to their record; the one with what they cost goes to those alone who have
    asked for it."""

    def __init__(self, chunks: Chunks, way: Way, counted: bool) -> None:
        self.chunks, self.way, self.counted = chunks, way, counted

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        while True:
            try:
                chunk = await anext(self.chunks)
            except Refused as refused:
                raise as_api_error(refused) from refused
            self.way.told(chunk)
            if chunk["choices"] or self.counted:
                return {**chunk, "usage": chunk.get("usage")} if self.counted else chunk

    async def aclose(self) -> None:
        """Nobody reads on."""
        await self.chunks.aclose()


def as_api_error(refused: Refused) -> ApiError:
    """A back end's refusal."""
    return ApiError(
        refused.status, refused.message, refused.param, refused.code, refused.retry_after_seconds, refused.kind
    )  # fmt: skip


def _gone(error: BaseException) -> bool:
    return isinstance(error, ClientGone) or not isinstance(error, Exception)
