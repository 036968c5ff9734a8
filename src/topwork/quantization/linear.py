"""Layers whose frozen weight is held in 4 or 8 bits: a linear layer, and an embedding that shares a head's weight."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from topwork.ops.packed import Packed
from topwork.ops.projection import Projection
from topwork.ops.quantized_linear import input_gradient, quantized_linear, write_output


class PackedModule(nn.Module):
    """Holds a packed weight. `weight` are its codes, as in a bitsandbytes checkpoint; the constants go along with them
    to other devices, and stay in their types whatever the module is cast to."""

    weight: nn.Parameter

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        self._packed: Packed | None = None

    @property
    def packed(self) -> Packed:
        """The weight, where the module is."""
        if self._packed is None:
            raise RuntimeError("a quantized layer was used before its weight was read")
        return self._packed

    def hold(self, packed: Packed) -> Self:
        """Take a weight."""
        if packed.shape != self.shape:
            raise ValueError(f"the weight has the shape {packed.shape}, the layer {self.shape}")
        self._packed = packed
        self.weight = nn.Parameter(packed.codes, requires_grad=False)
        return self

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """The module that this one stands for, its weight as it comes out of the packed one, frozen."""
        raise NotImplementedError

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._packed is not None:
            self._packed = replace(self._packed, codes=self.weight.data).to(self.weight.device)
        return self


class QuantizedLinear(PackedModule):
    """y = x W' + b. Stands where a linear layer stood (a transposed Conv1D too, whose weight is turned when packed)."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None = None) -> None:
        super().__init__((out_features, in_features))
        self.in_features, self.out_features = in_features, out_features
        self.turned = False
        """Whether it stands where a Conv1D stood, whose checkpoint holds the weight as [in, out]."""
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return quantized_linear(x, self.packed, self.bias)

    def projection(self) -> Projection | None:
        """What it is as a part of a group; None where its bias learns."""
        learns = self.bias is not None and self.bias.requires_grad
        return None if learns else Projection(self.packed, self.bias)

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy [..., out] -> dy W [..., in]."""
        return input_gradient(dy, self.packed)

    def products_into(self, x: Tensor, out: Tensor) -> Tensor:
        """The same as `forward`, written to `out` [n, out], without a gradient."""
        write_output(x, self.packed, self.bias, out)
        return out

    def dense(self, dtype: torch.dtype) -> nn.Linear | Conv1D:
        if self.turned:
            return self._turned_back(dtype)
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.packed.dense().to(dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return layer.train(False)

    def _turned_back(self, dtype: torch.dtype) -> Conv1D:
        with torch.device("meta"):
            layer = Conv1D(self.out_features, self.in_features)
        layer.weight = nn.Parameter(self.packed.dense().t().contiguous().to(dtype), requires_grad=False)
        bias = torch.zeros(self.out_features) if self.bias is None else self.bias.detach()
        layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=False)
        return layer.train(False)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class QuantizedEmbedding(PackedModule):
    """Rows of a packed weight [vocabulary, d]: the embedding of a model whose head is tied to it and quantized."""

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [...] -> [..., d]."""
        return self.packed.rows(tokens.reshape(-1)).view(*tokens.shape, self.shape[1])

    def dense(self, dtype: torch.dtype) -> nn.Embedding:
        return nn.Embedding.from_pretrained(self.packed.dense().to(dtype), freeze=True).train(False)


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """Every module of a model that holds a packed weight, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedModule)}


def packed_kinds(model: nn.Module) -> dict[str, int]:
    """How many layers of a model are packed in which way."""
    kinds = [module.packed.kind for module in packed_modules(model).values()]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def weight_bytes(model: nn.Module) -> int:
    """What a model in memory really holds as weights, packed or not; shared ones once."""
    packed = {id(module.weight): module.packed.nbytes for module in packed_modules(model).values()}
    return sum(packed.get(id(parameter), parameter.nbytes) for parameter in model.parameters())
