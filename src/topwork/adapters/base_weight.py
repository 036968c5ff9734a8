"""A frozen linear layer's weight, dense or packed, turned or not, as adapters look at it."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.ops.context import scratch_scope
from topwork.ops.quantized_linear import quantized_linear
from topwork.quantization.linear import QuantizedLinear

PANEL_VALUES = {"cpu": 1 << 20, "cuda": 1 << 27}
"""How much of a weight is looked at at a time: what a cache holds, on a GPU no more than is held anyway while packed
weights are multiplied."""


def row_panels(layer: nn.Module) -> Iterator[tuple[slice, Tensor]]:
    """(rows, those of the weight [rows, in]), panel by panel, in the type the layer multiplies with."""
    ranges, panel = _panels(layer)
    for rows in ranges:
        yield rows, panel(rows)


@torch.no_grad()
def weight_times(layer: nn.Module, right: Tensor) -> Tensor:
    """W right [out, n] of right [in, n], in the layer's type, without a gradient; of a packed W one panel is dense at a
    time."""
    ranges, panel = _panels(layer)
    parts = []
    for rows in ranges:
        with scratch_scope():
            dense = panel(rows)
            # the longer side on the right, where libraries like it
            parts.append(torch.mm(right.t().to(dense.dtype), dense.t()))
    return (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).t()


def _panels(layer: nn.Module) -> tuple[list[slice], Callable[[slice], Tensor]]:
    """Ranges of a weight's rows, and what gives them."""
    if isinstance(layer, QuantizedLinear):
        packed = layer.packed
        (outputs, inputs), panel = packed.shape, lambda rows: packed.panel(rows, slice(0, packed.shape[1]))
        device = packed.codes.device.type
    else:
        weight = _as_rows(layer)
        (outputs, inputs), panel = weight.shape, weight.__getitem__
        device = weight.device.type
    step = max(1, PANEL_VALUES.get(device, PANEL_VALUES["cpu"]) // inputs)
    return [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)], panel


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
