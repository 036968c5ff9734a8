"""A connection as uvicorn has it, with the limits that uvicorn lacks: a head that comes too slowly, a client that does
not read, more connections than are wanted; and refusals that are JSON."""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from topwork.serving.config import LimitsConfig
from topwork.serving.errors import ApiError
from topwork.serving.lingering import Lingering


def watched(limits: LimitsConfig) -> type[H11Protocol]:
    """uvicorn's protocol under these limits (uvicorn makes its own instances)."""
    return type("Watched", (WatchedProtocol,), {"limits": limits})


class WatchedProtocol(H11Protocol):
    """Timers: one from the first moment until a request's head is there, and again from the first byte of the next; one
    while the client reads nothing of what it is sent."""

    limits = LimitsConfig()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._lingering = Lingering(transport, self.loop, lambda: self.conn.their_state in (h11.SEND_BODY, h11.ERROR))
        super().connection_made(self._lingering)  # type: ignore[arg-type]
        if len(self.connections) > self.limits.connections:
            self._refuse(ApiError(503, "too many connections; ask again in a moment", code="overloaded", retry_after=1))
            return
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        if self._lingering.lingers:
            return
        waits = self._head is None and (self.cycle is None or self.cycle.response_complete)
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # a head is there, or there never will be one
            self._forget_head()
        elif waits and not self.transport.is_closing():
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        self._lingering.lost()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """What was sent lies here: the client reads too slowly, or not at all."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def send_400_response(self, msg: str) -> None:
        """No HTTP, or a head that is too long."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _watch_head(self) -> None:
        self._head = self.loop.call_later(self.limits.header_seconds, self._too_slow)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _too_slow(self) -> None:
        self._head = None
        seconds = self.limits.header_seconds
        self._refuse(ApiError(408, f"the head of the request did not arrive within {seconds:g} seconds"))

    def _refuse(self, error: ApiError) -> None:
        """An answer without the app; the connection ends with it."""
        self._forget_head()
        if self.transport.is_closing():
            return
        body = json.dumps(error.body()).encode()
        reason = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}[error.status]
        head = [f"HTTP/1.1 {error.status} {reason}", "content-type: application/json", f"content-length: {len(body)}"]
        head += ["connection: close", *(f"{name}: {value}" for name, value in error.headers().items()), "", ""]
        self.transport.write("\r\n".join(head).encode() + body)
        self._lingering.linger()
