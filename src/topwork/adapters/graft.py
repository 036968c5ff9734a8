"""Putting named adapters into a base and taking them out again: one walk over the model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from topwork.adapters.config import AdapterConfig
from topwork.adapters.files import Grafted
from topwork.adapters.method import Bare, Method, Original, Plan
from topwork.adapters.methods.table import METHODS
from topwork.adapters.module import AdaptedLayer, AdapterModule
from topwork.adapters.module_copy import planned_copy
from topwork.adapters.targets import find_saved
from topwork.common.errors import AdapterError


class Adapters:
    """The named adapters of one base. While a batch runs, its segments choose among them by name."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        original: Original | None = None,
        methods: Mapping[str, Method[Any]] = METHODS,
    ) -> None:
        """The tokenizer is asked only for a prompt that begins as a text, and `original`, a quantized base's weights
        from before by path, only for LoftQ. `methods` are those that may be added, by name."""
        self.model = model
        self.tokenizer = tokenizer
        self.original = original
        self.methods = methods
        self.configs: dict[str, AdapterConfig] = {}

    def add(self, name: str, config: AdapterConfig, seed: int = 0) -> list[str]:
        """Graft a fresh adapter, which changes nothing until it is trained; its dropout is off. Returns the paths of
        the modules where it has a part.

        Raises AdapterError for a name that is taken or cannot be a module's, and for targets that match nothing;
        nothing is grafted then.
        """
        if name in self.configs or not is_free(name):
            raise AdapterError(
                f"adapter name {name!r} is taken, empty or has a dot; taken: {sorted(self.configs)}, and what torch's "
                "modules call their own (training, weight …)"
            )
        plan = plan_adapter(self.model, config, self.tokenizer, self.original, self.methods)
        _refuse_nested(plan, adapted_layers(self.model))
        self.configs[name] = config
        try:
            for path, planned in plan.items():
                part = planned.make()
                layer = self._wrapped(path)
                part.reset_parameters(layer.base_layer, seed, path)
                layer.adapters[name] = part.to(_device_of(layer.base_layer)).train(False)
        except BaseException:
            self.remove(name)
            raise
        return list(plan)

    def remove(self, name: str) -> None:
        """Take an adapter out; a layer without adapters is the base's own again."""
        self._known(name)
        for path, layer in list(adapted_layers(self.model).items()):
            if name in layer.adapters:
                del layer.adapters[name]
            if not len(layer.adapters):
                _replace(self.model, path, layer.base_layer)
        del self.configs[name]

    def parts(self, name: str) -> dict[str, AdapterModule]:
        """An adapter's parts by the paths of their modules."""
        self._known(name)
        layers = adapted_layers(self.model)
        return {path: part for path, layer in layers.items() if (part := layer.part(name)) is not None}

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's trainable tensors by PEFT's names without the `base_model.model.` in front, sorted."""
        found = {_key(path, key): p for path, part in self.parts(name).items() for key, p in part.tensors().items()}
        return dict(sorted(found.items()))

    def state(self, name: str) -> dict[str, Tensor]:
        """What the adapter's file holds, by the same names, sorted."""
        found = {_key(path, key): t for path, part in self.parts(name).items() for key, t in part.state().items()}
        return dict(sorted(found.items()))

    def grafted(self, name: str) -> Grafted[Any]:
        """An adapter as its method's files look at it."""
        modules, config = bare_modules(self.model), self.model.config
        return Grafted(self.configs[name], self.parts(name), self.state(name), modules, config)

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Set an adapter's tensors from what `state` gave. Raises AdapterError naming what is missing, unknown or of
        another shape; nothing is set then."""
        own = self.state(name)
        tensors = _placed(tensors, own)
        missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        wrong = [key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape]
        if missing or unknown or wrong:
            told = [f"{len(missing)} missing (first {missing[0]})"] if missing else []
            told += [f"{len(unknown)} unknown (first {unknown[0]})"] if unknown else []
            told += [
                f"{len(wrong)} of another shape (first {wrong[0]}: {tuple(tensors[wrong[0]].shape)} in the file, "
                f"{tuple(own[wrong[0]].shape)} here)"
            ] if wrong else []  # fmt: skip
            raise AdapterError(f"the adapter's tensors do not fit this base: {'; '.join(told)}. Is it another base's?")
        with torch.no_grad():
            for path, part in self.parts(name).items():
                part.load_state({key: tensors[_key(path, key)] for key in part.state()})

    def train(self, name: str, mode: bool = True) -> None:
        """Dropout on or off in one adapter; the base itself always runs without."""
        for part in self.parts(name).values():
            part.train(mode)

    @contextmanager
    def evaluating(self, *names: str) -> Iterator[None]:
        """Dropout off in these adapters until the block ends, then as it was: for running the model between the steps
        of a training."""
        before = [(part, part.training) for name in names for part in self.parts(name).values()]
        try:
            for name in names:
                self.train(name, False)
            yield
        finally:
            for part, mode in before:
                part.train(mode)

    def _wrapped(self, path: str) -> AdaptedLayer:
        module = self.model.get_submodule(path)
        if isinstance(module, AdaptedLayer):
            return module
        layer = AdaptedLayer(module, path)
        layer.train(False)
        _replace(self.model, path, layer)
        return layer

    def _known(self, name: str) -> None:
        if name not in self.configs:
            raise AdapterError(f"no adapter {name!r} here; there are {sorted(self.configs) or 'none'}")


def is_free(name: str) -> bool:
    """Whether a module may be called so."""
    return bool(name) and "." not in name and not hasattr(nn.ModuleDict(), name)


def plan_adapter(
    model: PreTrainedModel,
    config: AdapterConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    original: Original | None = None,
    methods: Mapping[str, Method[Any]] = METHODS,
) -> Plan:
    """Which parts `config` would graft, by path; nothing is made, so a skeleton without weights will do.

    Raises AdapterError where it does not fit the base, or is of a method that is not among `methods`.
    """
    if config.method not in methods:
        raise AdapterError(
            f"method {config.method} is not known here; {', '.join(methods)} are. One of your own is given with its "
            f"record: methods=METHODS | {{{config.method!r}: …}}"
        )
    bare = replace(bare_base(model, tokenizer), original=original)
    plan = methods[config.method].plan(bare, config)
    saved = find_saved(bare.modules, config.saved_modules)
    _refuse_overlap(list(plan), saved)
    return plan | {path: planned_copy(bare.modules[path]) for path in saved}


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Every adapted layer by its path in the base."""
    return {path: m for path, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def bare_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Bare:
    """The base as if nothing were grafted."""
    modules = bare_modules(model)

    def path_of(module: nn.Module | None) -> str | None:
        own = module.base_layer if isinstance(module, AdaptedLayer) else module
        return next((path for path, there in modules.items() if there is own), None)

    embedding, head = path_of(model.get_input_embeddings()), path_of(model.get_output_embeddings())
    return Bare(modules, embedding, head, model.config, tokenizer)


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The base's own modules by path, as if nothing were grafted: what targets are matched against."""
    modules: dict[str, nn.Module] = {}

    def visit(path: str, module: nn.Module) -> None:
        own = module.base_layer if isinstance(module, AdaptedLayer) else module
        if path:
            modules[path] = own
        for name, child in own.named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    return modules


def _device_of(module: nn.Module) -> torch.device:
    """Where a module's tensors are."""
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _placed(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By our names: PEFT's `prompt_embeddings` stands in the file without the path that it has here."""
    places = {key.rpartition(".")[2]: key for key in own}
    return {key if "." in key or key in own else places.get(key, key): tensor for key, tensor in tensors.items()}


def _key(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _refuse_overlap(targets: Sequence[str], saved: Sequence[str]) -> None:
    for whole in saved:
        inside = [path for path in (*targets, *saved) if path.startswith(whole + ".")]
        inside += [whole] if whole in targets else []
        if inside:
            raise AdapterError(
                f"modules_to_save chooses {whole}, and {inside[0]} is chosen as well; one module can't be both, give "
                "longer names in modules_to_save or leave the other out with exclude_modules"
            )


def _refuse_nested(parts: Mapping[str, object], there: Mapping[str, object]) -> None:
    """Before anything is grafted: a module and one inside it can't both be adapted."""
    for path in parts:
        for other in there:
            if path.startswith(other + ".") or other.startswith(path + "."):
                raise AdapterError(
                    f"{path} and {other} lie in one another: one adapter saves the outer whole and another adapts the "
                    "inner, which one base cannot hold at once; name the same modules in both"
                )


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
