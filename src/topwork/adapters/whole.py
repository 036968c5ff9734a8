"""Modules that an adapter trains whole: `modules_to_save`, and every module under `method: full`."""

import copy
import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from topwork.adapters.config import AdapterConfig
from topwork.adapters.part import Part
from topwork.adapters.targets import matching
from topwork.common.errors import AdapterError
from topwork.quantization.linear import PackedModule, QuantizedLinear, packed_modules


class Whole(Part):
    """A copy of the module in fp32, run in the base's type in the module's place."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.module = fp32_copy(base_layer).requires_grad_(True)

    def adapted(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:  # noqa: ARG002
        weights = {name: parameter.to(y.dtype) for name, parameter in self.module.named_parameters()}
        return functional_call(self.module, weights, (x,))

    def tensors(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    @torch.no_grad()
    def replacement(self, base_layer: nn.Module) -> nn.Module:
        """The copy, frozen, each parameter in the type that the base's has."""
        merged = copy.deepcopy(self.module).requires_grad_(False).train(False)
        for key, parameter in merged.named_parameters():
            parameter.data = parameter.data.to(base_layer.get_parameter(key).dtype)
        return merged


class TiedHead(Part):
    """A head whose weight is the embedding's: it runs with the embedding's copy and has nothing of its own but a bias.

    The copy is held in a tuple, so that it is the embedding's part alone that has it as a parameter.
    """

    def __init__(self, base_layer: nn.Module, embedding: Whole) -> None:
        super().__init__()
        self.embedding = (embedding,)
        self.outputs = embedding.module.get_parameter("weight").shape[0]
        bias = getattr(base_layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())

    def adapted(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:  # noqa: ARG002
        weight = self.embedding[0].module.get_parameter("weight").to(y.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(y.dtype))

    @torch.no_grad()
    def replacement(self, base_layer: nn.Module) -> nn.Module:
        """A dense head of the base's type, its weight still to be tied to the embedding's."""
        dense = base_layer.dense(torch.float32) if isinstance(base_layer, QuantizedLinear) else base_layer
        if self.bias is not None:
            dense.get_parameter("bias").copy_(self.bias)
        return dense


def whole_targets(modules: Mapping[str, nn.Module], config: AdapterConfig) -> list[str]:
    """Paths of every module with parameters of its own, but those left out.

    Raises AdapterError where one cannot be held as a copy: it is given more than the tokens' rows, or mixes them.
    """
    out = set(matching(modules, config.exclude_modules)) if config.exclude_modules else set()
    chosen = [path for path, module in modules.items() if path not in out and _has_own(module)]
    wrong = [path for path in chosen if not _is_by_row(modules[path])]
    if wrong:
        raise AdapterError(
            f"method full cannot train {wrong[0]} ({type(modules[wrong[0]]).__name__}) or {len(wrong) - 1} others: a "
            "copy can stand for modules that take every token's row by itself; leave these out with exclude_modules: "
            f"{', '.join(sorted({path.rpartition('.')[2] for path in wrong}))}"
        )
    if not chosen:
        raise AdapterError(f"exclude_modules {config.exclude_modules!r} leaves nothing to train; loosen it")
    return chosen


def _has_own(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _is_by_row(module: nn.Module) -> bool:
    """A leaf that is called with rows and nothing else."""
    arguments = list(inspect.signature(module.forward).parameters.values())
    mixes = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return not mixes and not list(module.children()) and len(arguments) == 1


def fp32_copy(module: nn.Module) -> nn.Module:
    """A module of its own in fp32, out of packed ones too."""
    if isinstance(module, PackedModule):
        return module.dense(torch.float32)
    copied = copy.deepcopy(module)
    for path, inner in packed_modules(copied).items():
        copied.set_submodule(path, inner.dense(torch.float32))
    return copied.float()


def parameters_of(module: nn.Module) -> dict[int, int]:
    """How many parameters a module has, by identity (tied ones once); a packed weight counts as what it stands for."""
    counts = {id(parameter): parameter.numel() for parameter in module.parameters()}
    for layer in packed_modules(module).values():
        counts[id(layer.weight)] = layer.shape[0] * layer.shape[1]
    return counts
