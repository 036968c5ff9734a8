"""Modules that an adapter trains whole: `modules_to_save`, and every module under `method: full`."""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from topwork.adapters.method import Planned
from topwork.adapters.module import AdapterModule
from topwork.quantization.linear import PackedModule, packed_modules


class ModuleCopy(AdapterModule):
    """A copy of the module in fp32, run in the base's type in the module's place."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.module = fp32_copy(base_layer).requires_grad_(True)

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:  # noqa: ARG002
        weights = {name: parameter.to(y.dtype) for name, parameter in self.module.named_parameters()}
        return functional_call(self.module, weights, (x,))

    def freeze(self, base_layer: nn.Module, dtype: torch.dtype) -> None:
        """Matrices are multiplied in the base's type; vectors (norms, biases) may meet fp32, and stay as they are."""
        super().freeze(base_layer, dtype)
        for parameter in self.module.parameters():
            if parameter.dim() > 1:
                parameter.data = parameter.data.to(dtype)

    def tensors(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    @torch.no_grad()
    def replacement(self, base_layer: nn.Module) -> nn.Module:
        """The copy, frozen, each parameter in the type that the base's has."""
        merged = copy.deepcopy(self.module).requires_grad_(False).train(False)
        for key, parameter in merged.named_parameters():
            parameter.data = parameter.data.to(base_layer.get_parameter(key).dtype)
        return merged


def planned_copy(module: nn.Module, trained: int) -> Planned:
    """A copy of the module that is yet to be made, and how many parameters it has."""
    return Planned(lambda: ModuleCopy(module), trained)


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
