"""Putting named adapters into a base and taking them out again: one walk over the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from topwork.adapters.config import AdapterConfig
from topwork.adapters.files import Grafted
from topwork.adapters.fitting import Parts, fill, fresh_parts, parameters_of, plan_on, state_of
from topwork.adapters.method import Bare, Method, Original, Plan
from topwork.adapters.methods.table import METHODS
from topwork.adapters.module import AdaptedLayer
from topwork.adapters.settling import begun
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
        self.check_name(name)
        bare = self.bare()
        config = begun(bare.seen, config)
        plan = plan_on(bare, config, self.methods)
        _refuse_nested(plan, adapted_layers(self.model))
        self.put(name, config, fresh_parts(bare, plan, seed))
        return list(plan)

    def put(self, name: str, config: AdapterConfig, parts: Parts) -> None:
        """Graft parts that were made and filled before (`fitting.py`). Raises AdapterError as `add` does; nothing is
        grafted then."""
        self.check_name(name)
        _refuse_nested(parts, adapted_layers(self.model))
        self.configs[name] = config
        for path, part in parts.items():
            self._wrapped(path).adapters[name] = part

    def bare(self) -> Bare:
        """The base as if nothing were grafted; what is planned and made on it stays right whatever is."""
        return replace(bare_base(self.model, self.tokenizer), original=self.original)

    def check_name(self, name: str) -> None:
        """AdapterError for a name that is taken or cannot be a module's."""
        if name in self.configs or not is_free(name):
            raise AdapterError(
                f"adapter name {name!r} is taken, empty or has a dot; taken: {sorted(self.configs)}, and what torch's "
                "modules call their own (training, weight …)"
            )

    def remove(self, name: str) -> None:
        """Take an adapter out; a layer without adapters is the base's own again."""
        self._known(name)
        for path, layer in list(adapted_layers(self.model).items()):
            if name in layer.adapters:
                del layer.adapters[name]
            if not len(layer.adapters):
                _replace(self.model, path, layer.base_layer)
        del self.configs[name]

    def parts(self, name: str) -> Parts:
        """An adapter's parts by the paths of their modules."""
        self._known(name)
        layers = adapted_layers(self.model)
        return {path: part for path, layer in layers.items() if (part := layer.part(name)) is not None}

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's trainable tensors by PEFT's names without the `base_model.model.` in front, sorted."""
        return parameters_of(self.parts(name))

    def state(self, name: str) -> dict[str, Tensor]:
        """What the adapter's file holds, by the same names, sorted."""
        return state_of(self.parts(name))

    def grafted(self, name: str) -> Grafted[Any]:
        """An adapter as its method's files look at it."""
        modules, config = bare_modules(self.model), self.model.config
        return Grafted(self.configs[name], self.parts(name), self.state(name), modules, config)

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Set an adapter's tensors from what `state` gave. Raises AdapterError naming what is missing, unknown or of
        another shape; nothing is set then."""
        fill(self.parts(name), tensors)

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
    return plan_on(replace(bare_base(model, tokenizer), original=original), config, methods)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Every adapted layer by its path in the base. (`named_modules` would go through every adapter's parts as well,
    which takes longer than a step of a small model once there are many.)"""
    found: dict[str, AdaptedLayer] = {}

    def visit(path: str, module: nn.Module) -> None:
        if isinstance(module, AdaptedLayer):
            found[path] = module
        for name, child in module.named_children():
            if not (isinstance(module, AdaptedLayer) and child is module.adapters):
                visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    return found


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


def _refuse_nested(parts: Mapping[str, object], there: Mapping[str, object]) -> None:
    """Before anything is grafted: a module and one inside it can't both be adapted."""
    above = {outer: path for path in there for outer in _above(path)}
    for path in parts:
        other = above.get(path) or next((outer for outer in _above(path) if outer in there), None)
        if other is not None:
            raise AdapterError(
                f"{path} and {other} lie in one another: one adapter saves the outer whole and another adapts the "
                "inner, which one base cannot hold at once; name the same modules in both"
            )


def _above(path: str) -> Iterator[str]:
    """The paths of the modules that it lies in."""
    while (path := path.rpartition(".")[0]) != "":
        yield path


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
