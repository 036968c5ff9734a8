"""`topwork serve`: from a configuration to a server that answers."""

import asyncio
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError
from topwork.serving.app import create_app
from topwork.serving.config import ServeConfig
from topwork.serving.console import greeting
from topwork.serving.opening import Opened, Say, open_service
from topwork.serving.settings import load_config, make_config
from topwork.serving.shutdown import Server
from topwork.serving.state import ToLoad, bring_back


def serve(config: ServeConfig | Mapping[str, Any] | Path | str, say: Say = print) -> None:
    """Load what the configuration (or its file) names, and serve until SIGTERM or Ctrl+C.

    Raises RequestError where something is wrong before the first request: a port that is taken, an adapter of another
    base, a route to an adapter that is not there.
    """
    if isinstance(config, Path | str):
        config = load_config(Path(config))
    elif not isinstance(config, ServeConfig):
        config = make_config(config, "the server's options")
    with listening(config) as listener:
        opened = open_service(config, say)
        try:
            asyncio.run(run(opened, listener, say))
        finally:
            opened.close()


async def run(
    opened: Opened, listener: socket.socket, say: Say, started: Callable[[Server], None] | None = None
) -> None:  # fmt: skip
    """Load the adapters, greet, answer until told to end. `started` is told of the server before it serves."""
    service = opened.service
    await service.backend.start()
    try:
        await load_adapters(opened, say)
        server = Server(create_app(service), service)
        if started is not None:
            started(server)
        listener.listen(server.config.backlog)  # whoever reads the greeting may ask at once
        host, port = listener.getsockname()[:2]
        say(greeting(service, host, port))
        await server.serve([listener])
        say("the server has ended")
    finally:
        await service.backend.stop(0)


async def load_adapters(opened: Opened, say: Say) -> None:
    """Those that the configuration names, and those that were loaded before the last end. Raises RequestError for the
    first of the configuration's that does not fit, and for a route to one that is not there."""
    backend, engine = opened.service.backend, opened.service.config.engine
    all_stay = engine.resident_adapters is None and engine.adapters_bytes is None

    async def take(each: ToLoad) -> None:
        await backend.load(each.name, each.folder, pinned=each.pinned and all_stay, content=each.content)
        say(f"adapter {each.name}")

    await bring_back(opened.adapters, take, say)
    known = [*(card.id for card in backend.cards()), *opened.configured]
    missing = getattr(opened.service.parts.router, "missing", None)
    if missing is not None and (wrong := missing(known)):
        raise RequestError("\n".join(wrong))


def listening(config: ServeConfig) -> socket.socket:
    """The port, taken before the model is loaded, so that one that is taken is told at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
    except (OSError, UnicodeError) as error:
        listener.close()
        raise RequestError(
            f"nobody can listen at {config.host}:{config.port} ({error}); give another --port or --host"
        ) from error
    return listener
