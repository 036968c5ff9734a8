"""`topwork serve`: from a configuration to a server that answers."""

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topwork.adapters.graft import Adapters
from topwork.common.errors import RequestError
from topwork.data.template import ChatTemplate
from topwork.generation.engine import Engine, EngineSettings
from topwork.generation.registry import Registry
from topwork.models.base import Base
from topwork.models.load import load_base
from topwork.run.folder import RECIPE, TEMPLATE, read_recipe
from topwork.serving.app import create_app
from topwork.serving.asking import Reader
from topwork.serving.backends.local import LocalBackend
from topwork.serving.config import ServeConfig
from topwork.serving.console import greeting
from topwork.serving.parts import parts_of
from topwork.serving.service import Service
from topwork.serving.settings import load_config, make_config
from topwork.serving.shutdown import Server
from topwork.serving.worker import Worker

log = logging.getLogger("topwork.serving")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Opened:
    """A service that was not started yet, and the adapters that it is to have: name -> folder."""

    service: Service
    backend: LocalBackend
    adapters: Mapping[str, Path]


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
        asyncio.run(run(opened, listener, say))


def open_service(config: ServeConfig, say: Say = print) -> Opened:
    """The base is loaded; no adapter is, and no thread runs."""
    say(f"loading {config.model.model_name_or_path} …")
    base, template, adapters = _open_base(config, say)
    served = config.served_model_name or served_name(base.name)
    if served in adapters:
        raise RequestError(f"{served!r} is the name of the base and of an adapter; give another --served-model-name")
    grafted = Adapters(base.module, base.tokenizer)
    others = () if base.name == served else (base.name,)
    registry = Registry(base, grafted, reserved=(served, *others))
    parts = parts_of(config, (served, *others))
    settings = EngineSettings(
        batch_size=config.engine.batch_size, max_batch_tokens=config.engine.max_batch_tokens,
        kv_tokens=config.engine.kv_tokens,
    )  # fmt: skip
    engine = Engine(base, settings, contents=registry.contents)
    reader = Reader(base, config.limits)
    backend = LocalBackend(
        base, served, template, reader, Worker(engine, parts.meter.stepped), registry,
        config.engine.batch_size + config.engine.max_waiting,
        within=None if config.adapters_folder is None else [Path(config.adapters_folder)],
        templates=lambda folder: _own_template(base, folder, config),
    )  # fmt: skip
    return Opened(Service(config, backend, parts, others), backend, adapters)


async def run(
    opened: Opened, listener: socket.socket, say: Say, started: Callable[[Server], None] | None = None
) -> None:
    """Load the adapters, greet, answer until told to end. `started` is told of the server before it serves."""
    service, backend = opened.service, opened.backend
    await backend.start()
    try:
        await load_adapters(opened, say)
        server = Server(create_app(service), service)
        if started is not None:
            started(server)
        host, port = listener.getsockname()[:2]
        say(greeting(service, host, port))
        await server.serve([listener])
        say("the server has ended")
    finally:
        await backend.stop(0)


async def load_adapters(opened: Opened, say: Say) -> None:
    """Those that the configuration names. Raises RequestError for the first that does not fit."""
    for name, folder in opened.adapters.items():
        await opened.backend.take(name, folder, pinned=True)
        say(f"adapter {name}")
    router, known = opened.service.parts.router, list(opened.adapters)
    missing = getattr(router, "missing", None)
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


def served_name(name: str) -> str:
    """What requests call a base: its name without owner or folders."""
    return Path(name).name or name


def _open_base(config: ServeConfig, say: Say) -> tuple[Base, ChatTemplate, dict[str, Path]]:
    """The base, its chat template, and the adapters to be loaded: a run brings its own of each."""
    place = Path(config.model.model_name_or_path).expanduser()
    adapters = {name: _there(name, path) for name, path in config.adapters.items()}
    if not (place / RECIPE).is_file():
        quantization = config.quantization if config.quantization.active else None
        base = load_base(config.model, say, quantization)
        return base, ChatTemplate(base.tokenizer, config.chat_template, bool(config.fold_system)), adapters
    recipe = read_recipe(place)
    model = recipe.model.model_copy(
        update={name: getattr(config.model, name) for name in config.model.model_fields_set - {"model_name_or_path"}}
    )
    quantization = config.quantization if config.quantization.active else recipe.quantization
    base = load_base(model, say, quantization if quantization.active else None)
    stored = place / TEMPLATE
    jinja = config.chat_template or (str(stored) if stored.is_file() else None)
    fold = recipe.data.fold_system if config.fold_system is None else config.fold_system
    if place.resolve() not in [path.resolve() for path in adapters.values()]:
        adapters = {place.resolve().name: place, **adapters}
    return base, ChatTemplate(base.tokenizer, jinja, fold), adapters


def _there(name: str, path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise RequestError(f"adapter {name!r}: {path} is no folder; give one with adapter_config.json, or a run's")
    return folder


def _own_template(base: Base, folder: Path, config: ServeConfig) -> ChatTemplate | None:
    """A run's chat template, where the server was not told one for all."""
    if config.chat_template is not None or not (folder / RECIPE).is_file() or not (folder / TEMPLATE).is_file():
        return None
    recipe = read_recipe(folder)
    fold = recipe.data.fold_system if config.fold_system is None else config.fold_system
    return ChatTemplate(base.tokenizer, str(folder / TEMPLATE), fold)
