"""A whole server with its own engine, in a thread; how its refusals have to be, and that nothing is left in it."""

import asyncio
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

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


LEAKS = re.compile(r"/(tmp|home|work|usr|root|var|private)\b|Traceback|\.py\b|File \"")
LONGEST = 3000
"""Bytes of an error, at most."""


def check_refusal(response: httpx.Response) -> dict[str, Any]:
    """OpenAI's error: its keys, of their types, short, and nothing in it of this machine."""
    assert response.status_code >= 400, response.text[:500]
    assert response.headers["content-type"] == "application/json", response.text[:500]
    assert response.headers["x-request-id"]
    [(name, error)] = response.json().items()
    assert name == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert all(value is None or isinstance(value, str) for value in error.values())
    assert len(response.content) <= LONGEST
    assert not LEAKS.search(response.text), response.text
    if response.status_code in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    return dict(error)


def check_balance(served: Live) -> None:
    """Nothing runs, and nothing is held for what ran. Waits for what was told to end to do so."""
    worker = served.opened.service.backend.worker  # type: ignore[attr-defined]
    until = time.monotonic() + WAIT_SECONDS
    while (worker.running or served.opened.service.running or served.engine.busy) and time.monotonic() < until:
        time.sleep(0.01)
    figures = served.engine.statistics()
    assert (worker.running, figures.running, figures.waiting) == (0, 0, 0)
    assert figures.blocks_free + figures.blocks_cached == figures.blocks_total
    assert all(version.uses == 0 for version in served.registry.versions())
    assert worker.alive
    assert worker.failures == 0
