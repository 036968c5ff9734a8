"""A whole server with its own engine, in a thread, over a tiny random base; and adapters that sign what they say."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from topwork.serving.config import ServeConfig
from topwork.serving.launch import Opened, listening, open_service, run
from topwork.serving.shutdown import Server

WAIT_SECONDS = 60


@dataclass(frozen=True)
class Live:
    """Where it answers, and what it consists of."""

    address: str
    opened: Opened
    server: Server

    @property
    def engine(self) -> Any:
        """Its thread's own; look at it when nothing runs."""
        return self.opened.service.backend.worker.engine  # type: ignore[attr-defined]

    @property
    def registry(self) -> Any:
        """The same."""
        return self.opened.service.backend.registry  # type: ignore[attr-defined]


@contextmanager
def live(values: Mapping[str, Any]) -> Iterator[Live]:
    """Served from here on, and told to end afterwards; what runs then may go on to its end."""
    config = ServeConfig.model_validate({"port": 0, **values})
    ready, found, failed = threading.Event(), [], []

    def serve() -> None:
        try:
            with listening(config) as listener:
                address = "http://{}:{}".format(*listener.getsockname()[:2])
                opened = open_service(config, lambda _: None)
                try:
                    asyncio.run(run(opened, listener, _quiet(ready), lambda s: found.append(Live(address, opened, s))))
                finally:
                    opened.close()
        except BaseException as error:
            failed.append(error)
            ready.set()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert ready.wait(WAIT_SECONDS)
        if failed:
            raise failed[0]
        yield found[0]
    finally:
        if found and thread.is_alive():
            found[0].server.stop()
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()


def _quiet(ready: threading.Event) -> Any:
    """Told of the greeting, from which on it answers."""

    def say(text: str) -> None:
        if "answers at" in text:
            ready.set()

    return say
