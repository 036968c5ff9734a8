"""A frozen linear layer's weight, dense or packed, turned or not, as adapters look at it."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.ops.quantized_linear import quantized_linear
from topwork.quantization.linear import QuantizedLinear

PANEL_VALUES = 1 << 20
"""How much of a weight is looked at at a time."""


def row_panels(layer: nn.Module) -> Iterator[tuple[slice, Tensor]]:
    """(rows, those of the weight [rows, in]), panel by panel, in the type the layer multiplies with."""
    packed = layer.packed if isinstance(layer, QuantizedLinear) else None
    weight = None if packed is not None else _as_rows(layer)
    outputs, inputs = packed.shape if packed is not None else weight.shape  # type: ignore[union-attr]
    step = max(1, PANEL_VALUES // inputs)
    for start in range(0, outputs, step):
        rows = slice(start, min(start + step, outputs))
        yield rows, packed.panel(rows, slice(0, inputs)) if packed is not None else weight[rows]  # type: ignore[index]


def dense_weight(layer: nn.Module) -> Tensor:
    """The whole weight [out, in] in fp32, a tensor of its own."""
    return torch.cat([panel.float() for _, panel in row_panels(layer)])


def product(layer: nn.Module, x: Tensor) -> Tensor:
    """x [n, in] -> x W' [n, out], without the bias."""
    if isinstance(layer, QuantizedLinear):
        return quantized_linear(x, layer.packed)
    return F.linear(x, _as_rows(layer))


def _as_rows(layer: nn.Module) -> Tensor:
    weight = layer.get_parameter("weight").detach()
    return weight if isinstance(layer, nn.Linear) else weight.t()  # Conv1D holds [in, out]
