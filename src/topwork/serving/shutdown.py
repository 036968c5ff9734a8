"""uvicorn's server, going down as it should: nothing new is taken, what runs may end, what does not is told.

The first SIGTERM or SIGINT begins it; while answers end, connections are still taken and answered with 503, so that who
balances load hears of it. The second ends the process's answers at once.
"""

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn

from topwork.serving.connections import watched
from topwork.serving.service import Service

log = logging.getLogger("topwork.serving")

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Server(uvicorn.Server):
    """Runs an app until it is told to end; `run` and `serve` are uvicorn's."""

    def __init__(self, app: Any, service: Service) -> None:
        limits = service.config.limits
        super().__init__(
            uvicorn.Config(
                app,
                http=watched(limits),
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=min(2048, limits.connections),
                timeout_keep_alive=max(1, round(limits.idle_seconds)),
                timeout_graceful_shutdown=5,
            )
        )
        self.service = service
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[Any] | None = None) -> None:
        """Until it is told to end. The back end is started before and stopped after."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def stop(self) -> None:
        """As the first signal, from any thread; as the second when it is called again."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._told_to_end)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's raises the signal again in the end, and the process would seem to have died of it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """A signal came."""
        self.stop()

    def _told_to_end(self) -> None:
        if self._draining is None:
            grace = self.service.config.limits.grace_seconds
            log.info(
                "going down: %d answers run and may end within %g seconds (once more ends them at once)",
                len(self.service.running), grace,
            )  # fmt: skip
            self._draining = asyncio.get_running_loop().create_task(self._drain(grace))
        else:
            self.service.cut()
            self.should_exit = self.force_exit = True

    async def _drain(self, grace_seconds: float) -> None:
        await self.service.drain(grace_seconds)
        self.should_exit = True
