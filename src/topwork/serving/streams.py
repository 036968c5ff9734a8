"""A request on its way to its end: whatever ends it before (the client goes, its time is up, the server goes) ends its
work, and what can still be told is told."""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from topwork.serving.backends.backend import Chunks
from topwork.serving.errors import ApiError

log = logging.getLogger("topwork.serving")

DONE = b"data: [DONE]\n\n"
FAILED = "the server failed while it answered; its log tells why"


class ClientGone(Exception):
    """Nobody is left to be answered."""


class Run:
    """`async with Run(…)`: what is awaited inside is cancelled by `end(error)`, and `error` is raised in its place."""

    def __init__(self, receive: Receive, seconds: float, running: "set[Run]") -> None:
        """receive  where the client's going is told (its body has been read)
        seconds  how long it may take
        running  where it stands while it runs
        """
        self._receive, self._seconds, self._running = receive, seconds, running
        self._error: Exception | None = None
        self._task: asyncio.Task[Any] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def end(self, error: Exception) -> None:
        """The work ends here, and why. The first reason counts."""
        if self._task is not None and self._error is None:
            self._error = error
            self._task.cancel()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._running.add(self)
        self._timer = loop.call_later(
            self._seconds, self.end, ApiError(504, f"no answer within {self._seconds:g} seconds", code="timeout")
        )
        self._watch = loop.create_task(self._watched())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        self._running.discard(self)
        assert self._timer is not None
        assert self._watch is not None
        self._timer.cancel()
        self._watch.cancel()
        if self._error is not None and isinstance(raised, asyncio.CancelledError):
            assert task is not None
            if task.uncancel() == 0:  # else somebody else cancels it too
                raise self._error from None

    async def _watched(self) -> None:
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.end(ClientGone())
                return


class EventStream(Response):
    """Chunks as server-sent events, then `[DONE]`. A failure on the way is an event with an error."""

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: Chunks,
        begin: Callable[[Receive], Run],
        ended: Callable[[BaseException | None], None],
        headers: Mapping[str, str],
    ) -> None:
        """`ended` is told when it is over, whatever came of it."""
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.chunks, self.begin, self.ended = chunks, begin, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        error: BaseException | None = None
        try:
            async with self.begin(receive):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for chunk in self.chunks:
                    await send({"type": "http.response.body", "body": event(chunk), "more_body": True})
        except (ClientGone, ApiError) as told:
            error = told
        except Exception as failed:
            log.exception("an answer failed on its way")
            error = ApiError(500, FAILED, code="internal_error")
            error.__cause__ = failed
        except BaseException as cancelled:
            error = cancelled
            raise
        finally:
            await self.chunks.aclose()
            self.ended(error)
        if not isinstance(error, ClientGone):
            last = event(error.body()) if isinstance(error, ApiError) else b""
            await send({"type": "http.response.body", "body": last + DONE, "more_body": False})


def event(value: Mapping[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"
