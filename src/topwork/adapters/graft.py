"""Putting named adapters into a base and taking them out again: one walk over the model."""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from topwork.adapters.config import AdapterConfig
from topwork.adapters.lora import AdaptedLayer, LoraLinear, LoraWeights, SavedModule
from topwork.adapters.targets import Target, features, find_saved, find_targets
from topwork.common.errors import AdapterError
from topwork.quantization.linear import PackedModule, packed_modules


class Adapters:
    """The named adapters of one base. While a stream runs, its segments choose among them by name."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.configs: dict[str, AdapterConfig] = {}

    def add(self, name: str, config: AdapterConfig, seed: int = 0) -> list[Target]:
        """Graft a fresh adapter, which changes nothing until it is trained; its dropout is off. Returns where it went.

        Raises AdapterError for a name that is taken or cannot be a module's, and for targets that match nothing.
        """
        if name in self.configs or not name or "." in name:
            raise AdapterError(f"adapter name {name!r} is taken, empty or has a dot; taken: {sorted(self.configs)}")
        modules = bare_modules(self.model)
        targets = find_targets(modules, head_path(self.model), config)
        saved = find_saved(modules, config.modules_to_save or [])
        _refuse_overlap([target.path for target in targets], saved)
        wanted: dict[str, type] = {target.path: LoraLinear for target in targets}
        _refuse_other_use(self.model, wanted | dict.fromkeys(saved, SavedModule))
        for target in targets:
            self._graft_lora(name, target, config, seed)
        for path in saved:
            layer = self._wrapped(path, SavedModule)
            layer.adapters[name] = _copy(layer.base_layer).requires_grad_(True)
        self.configs[name] = config
        return targets

    def remove(self, name: str) -> None:
        """Take an adapter out; a layer without adapters is the base's own again."""
        self._known(name)
        for path, layer in list(adapted_layers(self.model).items()):
            if name in layer.adapters:
                del layer.adapters[name]
            if not len(layer.adapters):
                _replace(self.model, path, layer.base_layer)
        del self.configs[name]

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's trainable tensors by PEFT's names without the `base_model.model.` in front, sorted."""
        self._known(name)
        found: dict[str, nn.Parameter] = {}
        for path, layer in adapted_layers(self.model).items():
            if name not in layer.adapters:
                continue
            weights = layer.adapters[name]
            if isinstance(weights, LoraWeights):
                found[f"{path}.lora_A.weight"] = weights.lora_A
                found[f"{path}.lora_B.weight"] = weights.lora_B
            else:
                found |= {f"{path}.{key}": parameter for key, parameter in weights.named_parameters()}
        return dict(sorted(found.items()))

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Set an adapter's tensors. Raises AdapterError naming what is missing, unknown or of another shape."""
        own = self.parameters(name)
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
            for key, parameter in own.items():
                parameter.copy_(tensors[key])

    def train(self, name: str, mode: bool = True) -> None:
        """Dropout on or off in one adapter; the base itself always runs without."""
        self._known(name)
        for layer in adapted_layers(self.model).values():
            if name in layer.adapters:
                layer.adapters[name].train(mode)

    def _graft_lora(self, name: str, target: Target, config: AdapterConfig, seed: int) -> None:
        layer = self._wrapped(target.path, LoraLinear)
        weight = layer.weight
        inputs, outputs = features(layer.base_layer)
        scaling = target.alpha / (math.sqrt(target.r) if config.use_rslora else target.r)
        weights = LoraWeights(inputs, outputs, target.r, scaling, config.lora_dropout)
        weights.reset(seed, target.path, gaussian=config.init_lora_weights == "gaussian")
        layer.adapters[name] = weights.to(weight.device).train(False)

    def _wrapped(self, path: str, kind: type[AdaptedLayer]) -> AdaptedLayer:
        module = self.model.get_submodule(path)
        if isinstance(module, AdaptedLayer):
            return module
        layer = kind(module)
        layer.train(False)
        _replace(self.model, path, layer)
        return layer

    def _known(self, name: str) -> None:
        if name not in self.configs:
            raise AdapterError(f"no adapter {name!r} here; there are {sorted(self.configs) or 'none'}")


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Every adapted layer by its path in the base."""
    return {path: m for path, m in model.named_modules() if isinstance(m, AdaptedLayer)}


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


def head_path(model: PreTrainedModel) -> str | None:
    """The output head's path, adapted or not."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None)


def _refuse_overlap(targets: Sequence[str], saved: Sequence[str]) -> None:
    for whole in saved:
        inside = [path for path in (*targets, *saved) if path.startswith(whole + ".")]
        inside += [whole] if whole in targets else []
        if inside:
            raise AdapterError(
                f"modules_to_save chooses {whole}, and {inside[0]} is chosen as well; one module can't be both, give "
                "longer names in modules_to_save or leave the other out with exclude_modules"
            )


def _refuse_other_use(model: nn.Module, wanted: Mapping[str, type]) -> None:
    """Before anything is grafted: one module can't be adapted by one adapter and trained whole by another."""
    for there, layer in adapted_layers(model).items():
        for path, kind in wanted.items():
            nested = path.startswith(there + ".") or there.startswith(path + ".")
            if nested or (path == there and not isinstance(layer, kind)):
                raise AdapterError(
                    f"{path} is adapted by one adapter and saved whole by another; both in one base are not supported"
                )


def _copy(module: nn.Module) -> nn.Module:
    """A module of its own in fp32, out of packed ones too."""
    if isinstance(module, PackedModule):
        return module.dense(torch.float32)
    copied = copy.deepcopy(module)
    for path, inner in packed_modules(copied).items():
        copied.set_submodule(path, inner.dense(torch.float32))
    return copied.float()


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
