"""A connection that is closed while the client still sends: what is left is read and thrown away for a moment, since
closing over unread bytes resets it, and the client would lose the answer that tells why."""

import asyncio
from collections.abc import Callable
from typing import Any

SECONDS = 2.0
"""For so long at most; a client that has sent everything, or reads to the end, is gone before."""


class Lingering:
    """uvicorn's transport, whose `close` says that nothing more will come and lets the client finish. The protocol is
    to throw away what it is given while this `lingers`."""

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, unread: Callable[[], bool]
    ) -> None:
        """`unread` tells whether some of a request may still be on its way."""
        self._transport, self._loop, self._unread = transport, loop, unread
        self._timer: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    @property
    def lingers(self) -> bool:
        """Whether it was closed, and the client has not noticed."""
        return self._timer is not None

    def is_closing(self) -> bool:
        """As of a transport: whether nothing can be written."""
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        """At once where the client has sent all of its request."""
        if self._unread():
            self.linger()
        elif not self.lingers:
            self._transport.close()

    def linger(self) -> None:
        """It is closed when the client closes, or by the clock."""
        if self.is_closing():
            return
        if not self._transport.can_write_eof():
            self._transport.close()
            return
        self._timer = self._loop.call_later(SECONDS, self._transport.abort)
        self._transport.write_eof()
        self._transport.resume_reading()

    def lost(self) -> None:
        """The connection is gone."""
        if self._timer is not None:
            self._timer.cancel()
