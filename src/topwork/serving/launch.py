"""`topwork serve`: from a configuration to a server that answers."""

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
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
from topwork.serving.backends.backend import Card
from topwork.serving.backends.local import LocalBackend
from topwork.serving.config import ServeConfig
from topwork.serving.console import greeting
from topwork.serving.parts import parts_of
from topwork.serving.seams import Parts
from topwork.serving.service import Kept, Service
from topwork.serving.settings import load_config, make_config
from topwork.serving.shutdown import Server
from topwork.serving.state import StateFolder, ToLoad, bring_back
from topwork.serving.worker import Worker

log = logging.getLogger("topwork.serving")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Opened:
    """A service that was not started yet, the adapters that it is to have, and those that it was configured with: some
    may have been unloaded before its last end."""

    service: Service
    adapters: Sequence[ToLoad]
    configured: Sequence[str] = ()
    close: Callable[[], None] = lambda: None


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


def open_service(config: ServeConfig, say: Say = print) -> Opened:
    """The base is loaded; no adapter is, and no thread runs."""
    state = StateFolder(Path(config.state_folder), say) if config.state_folder is not None else None
    try:
        return _opened(config, state, say)
    except BaseException:
        if state is not None:
            state.close()
        raise


def _opened(config: ServeConfig, state: StateFolder | None, say: Say) -> Opened:
    say(f"loading {config.model.model_name_or_path} …")
    base, template, adapters = _open_base(config, say)
    served = config.served_model_name or served_name(base.name)
    if served in adapters:
        raise RequestError(f"{served!r} is the name of the base and of an adapter; give another --served-model-name")
    others = () if base.name == served else (base.name,)
    if state is None:
        parts, kept = parts_of(config, (served, *others)), Kept()
        found = [ToLoad(name, folder, None, True, True) for name, folder in adapters.items()]
    else:
        state.for_base(base.fingerprint, say)
        parts = parts_of(config, (served, *others), state.state.routes, state.keep_routes)
        kept = _kept(state, adapters)
        found = state.to_load(adapters)
    backend = _backend(config, base, template, (served, *others), parts)
    service = Service(config, backend, parts, others, kept)
    return Opened(service, found, list(adapters), state.close if state is not None else lambda: None)


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
    backend = opened.service.backend

    async def take(each: ToLoad) -> None:
        await backend.load(each.name, each.folder, pinned=each.pinned, content=each.content)
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


def served_name(name: str) -> str:
    """What requests call a base: its name without owner or folders."""
    return Path(name).name or name


def _backend(
    config: ServeConfig, base: Base, template: ChatTemplate, names: Sequence[str], parts: Parts
) -> LocalBackend:  # fmt: skip
    """This process's engine over the base."""
    registry = Registry(base, Adapters(base.module, base.tokenizer), reserved=names)
    settings = EngineSettings(
        batch_size=config.engine.batch_size, max_batch_tokens=config.engine.max_batch_tokens,
        kv_tokens=config.engine.kv_tokens,
    )  # fmt: skip
    engine = Engine(base, settings, contents=registry.contents)
    within = [] if config.adapters_folder is None else [Path(config.adapters_folder).resolve()]
    return LocalBackend(
        base, names[0], template, Reader(base, config.limits), Worker(engine, parts.meter.stepped), registry,
        config.engine.batch_size + config.engine.max_waiting, within, config.force,
        lambda folder: _own_template(base, folder, config),
    )  # fmt: skip


def _kept(state: StateFolder, configured: Mapping[str, Path]) -> Kept:
    """What is loaded and unloaded is written down."""

    def loaded(card: Card, folder: Path) -> None:
        state.loaded(card.id, folder, card.content)

    return Kept(loaded, lambda name: state.unloaded(name, configured))


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
