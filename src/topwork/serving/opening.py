"""What a configuration is made into: the base and the adapters it names, and who answers with them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import environ
from pathlib import Path
from tempfile import TemporaryDirectory

from topwork.adapters.foreign import adapter_folder
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import read_adapter
from topwork.common.errors import AdapterError, RequestError
from topwork.common.paths import plain_path
from topwork.data.chat.template import ChatTemplate, Reading
from topwork.generation.engine import Engine, EngineSettings
from topwork.generation.registry import Registry
from topwork.generation.versions import Capacity
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.source import find_source
from topwork.quantization.config import QuantizationConfig
from topwork.run.folder import RECIPE, TEMPLATE, read_recipe
from topwork.run.given import place_of
from topwork.run.loading import open_base
from topwork.run.vocabulary import shared_base, with_vocabulary
from topwork.serving.asking import Reader
from topwork.serving.backends.backend import Card
from topwork.serving.backends.local import LocalBackend
from topwork.serving.backends.vllm import Asked, VllmBackend
from topwork.serving.config import ServeConfig
from topwork.serving.parts import parts_of
from topwork.serving.seams import Parts
from topwork.serving.service import Kept, Service
from topwork.serving.state import StateFolder, ToLoad
from topwork.serving.worker import Worker

Say = Callable[[str], None]


@dataclass(frozen=True)
class Opened:
    """A service that was not started yet, the adapters that it is still to load, and those that it was configured with:
    some may have been unloaded before its last end."""

    service: Service
    adapters: Sequence[ToLoad]
    configured: Sequence[str] = ()
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Named:
    """What the configuration names; a run's folder brings its base as it was held, its template and its adapter.

    template  None is the tokenizer's own
    reading   how its rows were read, and messages are
    """

    model: ModelConfig
    quantization: QuantizationConfig
    template: str | None
    fold_system: bool
    adapters: Mapping[str, Path]
    reading: Reading | None = None


def open_service(config: ServeConfig, say: Say = print) -> Opened:
    """The base is loaded (or looked at, where vLLM is to have it); no adapter is, and no thread runs."""
    state = StateFolder(Path(config.state_folder), say) if config.state_folder is not None else None
    try:
        return _opened(config, state, say)
    except BaseException:
        if state is not None:
            state.close()
        raise


def named_by(config: ServeConfig) -> Named:
    """Raises RequestError for an adapter's folder, or the adapters folder, that is not there."""
    place = Path(plain_path(config.model.model_name_or_path))
    adapters = {name: _there(name, path) for name, path in config.adapters.items()}
    if missing := [folder for folder in _within(config) if not folder.is_dir()]:
        raise RequestError(f"adapters_folder {missing[0]} is no folder; make it, or name the one that adapters are in")
    if not (place / RECIPE).is_file():
        return Named(config.model, config.quantization, config.chat_template, bool(config.fold_system), adapters)
    recipe = read_recipe(place)
    changed = config.model.model_fields_set - {"model_name_or_path"}
    model = recipe.model.model_copy(update={name: getattr(config.model, name) for name in changed})
    stored = place / TEMPLATE
    if place.resolve() not in [path.resolve() for path in adapters.values()]:
        adapters = {place.resolve().name: place, **adapters}
    return Named(
        model,
        config.quantization if config.quantization.active else recipe.quantization,
        config.chat_template or (str(stored) if stored.is_file() else None),
        recipe.data.fold_system if config.fold_system is None else config.fold_system,
        adapters,
        Reading.of(recipe.data),
    )


def served_name(name: str) -> str:
    """What requests call a base: its name without owner or folders."""
    return Path(name).name or name


def _opened(config: ServeConfig, state: StateFolder | None, say: Say) -> Opened:
    named = named_by(config)
    say(f"loading {named.model.model_name_or_path} …")
    base = None
    if config.vllm is None:
        named = replace(named, model=_with_vocabularies(named))
        base = open_base(named.model, say, named.quantization if named.quantization.active else None)
    own = base.name if base is not None else find_source(named.model, say).name
    served = config.served_model_name or served_name(own)
    asked = named.model.model_name_or_path  # an alias answers too; a path stays ours
    names = tuple(dict.fromkeys((served, own, *([] if Path(plain_path(asked)).exists() else [asked]))))
    if taken := [name for name in names if name in named.adapters]:
        raise RequestError(f"{taken[0]!r} is the name of the base and of an adapter; give the adapter another")
    found = [ToLoad(name, folder, None, True, True) for name, folder in named.adapters.items()]
    parts, kept = None, Kept()
    if state is not None:
        state.for_base(base.fingerprint if base is not None else None, say)
        parts = parts_of(config, names, state.state.routes, state.keep_routes)
        kept, found = _kept(state, named.adapters), state.to_load(named.adapters, say)
    parts = parts or parts_of(config, names)
    closing = ExitStack()
    if state is not None:
        closing.callback(state.close)
    if base is not None:
        service = Service(config, _local(config, named, base, names, parts), parts, names[1:], kept)
        return Opened(service, found, list(named.adapters), closing.close)
    first = {each.name: each.folder for each in found if each.configured}
    service = Service(config, _vllm(config, named, names, first, closing, say), parts, names[1:], kept)
    return Opened(service, [each for each in found if not each.configured], list(named.adapters), closing.close)


def _with_vocabularies(named: Named) -> ModelConfig:
    """The base with rows for the tokens that its adapters got. One that can't be read is for its loading to tell of."""
    models = [named.model]
    for folder in map(adapter_folder, named.adapters.values()):
        try:
            models.append(with_vocabulary(named.model, read_adapter(folder), folder))
        except AdapterError:
            continue
    return shared_base(models)


def _local(config: ServeConfig, named: Named, base: Base, names: Sequence[str], parts: Parts) -> LocalBackend:
    """This process's engine over the base."""
    capacity = Capacity(config.engine.resident_adapters, config.engine.adapters_bytes)
    registry = Registry(base, Adapters(base.module, base.tokenizer), capacity, names)
    settings = EngineSettings(
        batch_size=config.engine.batch_size, max_batch_tokens=config.engine.max_batch_tokens,
        kv_tokens=config.engine.kv_tokens,
    )  # fmt: skip
    engine = Engine(base, settings, contents=registry.contents)
    registry.on_change(lambda change: engine.forget(change.version.adapter) if change.kind == "removed" else None)
    return LocalBackend(
        base, names[0], ChatTemplate(base.tokenizer, named.template, named.fold_system, named.reading or Reading()),
        Reader(base, config.limits),
        Worker(engine, parts.meter.stepped), registry, config.engine.batch_size + config.engine.max_waiting,
        _within(config), config.force, lambda folder: _own_template(base, folder, config),
    )  # fmt: skip


def _vllm(
    config: ServeConfig, named: Named, names: Sequence[str], first: Mapping[str, Path], closing: ExitStack, say: Say
) -> VllmBackend:  # fmt: skip
    """A vLLM behind us. What it reads lies beside the state, or in a folder that goes with the server."""
    assert config.vllm is not None
    template = None
    if named.template is not None:
        template = Path(plain_path(named.template))
        if not template.is_file():
            raise RequestError(f"vLLM takes a chat template as a file; {named.template!r} is none")
    if named.fold_system:
        raise RequestError("fold_system is not to be had with vLLM; give a chat template that does it")
    key = environ.get(config.vllm.key_from) if config.vllm.key_from is not None else None
    asked = Asked(named.model, named.quantization, names[0], names[1:], first, template, _within(config) or None)
    work = config.vllm.work_folder or (config.state_folder and f"{config.state_folder}/vllm")
    work = work or closing.enter_context(TemporaryDirectory(prefix="topwork-vllm-"))
    return VllmBackend(asked, config.vllm, Path(work), say, key)


def _within(config: ServeConfig) -> list[Path]:
    return [] if config.adapters_folder is None else [Path(config.adapters_folder).resolve()]


def _kept(state: StateFolder, configured: Mapping[str, Path]) -> Kept:
    """What is loaded and unloaded is written down."""

    def loaded(card: Card, folder: Path) -> None:
        state.loaded(card.id, folder, card.content)

    return Kept(loaded, lambda name: state.unloaded(name, configured))


def _there(name: str, path: str) -> Path:
    folder, _ = place_of(path)
    if not folder.is_dir():
        raise RequestError(f"adapter {name!r}: {path} is no folder; give one with adapter_config.json, or a run's")
    return folder


def _own_template(base: Base, folder: Path, config: ServeConfig) -> ChatTemplate | None:
    """A run's chat template, where the server was not told one for all."""
    if config.chat_template is not None or not (folder / RECIPE).is_file() or not (folder / TEMPLATE).is_file():
        return None
    recipe = read_recipe(folder)
    fold = recipe.data.fold_system if config.fold_system is None else config.fold_system
    return ChatTemplate(base.tokenizer, str(folder / TEMPLATE), fold, Reading.of(recipe.data))
