"""y = x W' + b with W in 4 or 8 bits: a panel of W is made dense, multiplied while it is in the cache, and forgotten.

No more than a panel of the weight is dense at a time, and nothing of it is kept for the backward pass, which makes
other panels: rows of W for the output, columns of W for the input's gradient. Each output column is one product over
all inputs, each input's gradient one product over all outputs, so both round as the dense layer's do. W is frozen and
has no gradient.

A panel comes in the type that W was quantized from and is then taken to x's, as bitsandbytes does it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from topwork.ops.context import scratch_scope
from topwork.ops.grouped import Addend, Product, grouped_products, multiplies_all
from topwork.ops.packed import Packed

PANEL_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
"""How large a dense panel may be: what stays in a core's cache, on a GPU what keeps it busy."""


def quantized_linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> [..., out] in x's type."""
    return _QuantizedLinear.apply(x, weight, bias)


def output(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """x [..., in] -> [..., out] without a gradient: panels of rows."""
    outputs, inputs = weight.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    write_output(x.reshape(-1, inputs), weight, bias, y.view(-1, outputs))
    return y


Terms = Callable[[slice], tuple[Addend, ...]]
"""What is added to a product, for some of its columns."""


def write_output(
    x: Tensor, weight: Packed, bias: Tensor | None, y: Tensor, add: bool = False, terms: Terms | None = None
) -> None:
    """x [n, in] -> y [n, out], whose rows may lie in a wider buffer; with `add` on top of what y holds, which is
    rounded with the product, and without a bias. `terms` (and the bias among them) are added before it is rounded."""
    outputs, inputs = weight.shape
    step = _panel(weight, inputs, x)
    for start in range(0, outputs, step):
        rows = slice(start, min(start + step, outputs))
        with scratch_scope():  # one panel at a time
            panel = weight.panel(rows, slice(0, inputs)).to(x.dtype).t()
            if terms is not None:
                grouped_products([Product(x, panel, y[:, rows], addends=terms(rows))])
            elif add:
                y[:, rows].addmm_(x, panel)
            elif bias is None:
                torch.mm(x, panel, out=y[:, rows])
            else:
                torch.addmm(bias[rows], x, panel, out=y[:, rows])
            del panel


def input_gradient(
    dy: Tensor, weight: Packed, into: Tensor | None = None, add: bool = False, terms: Terms | None = None
) -> Tensor:
    """dy [..., out] -> dy W [..., in]: panels of columns; written to `into` [n, in] or added to it where given.
    `terms` are added before it is rounded."""
    outputs, inputs = weight.shape
    step = _panel(weight, outputs, dy)
    dx = dy.new_empty(*dy.shape[:-1], inputs) if into is None else into
    flat_dy, flat_dx = dy.reshape(-1, outputs), dx.view(-1, inputs)
    for start in range(0, inputs, step):
        columns = slice(start, min(start + step, inputs))
        with scratch_scope():  # one panel at a time
            panel = weight.panel(slice(0, outputs), columns).to(dy.dtype)
            if terms is not None or multiplies_all(flat_dy):
                added = () if terms is None else terms(columns)
                grouped_products([Product(flat_dy, panel, flat_dx[:, columns], beta=int(add), addends=added)])
            elif add:
                flat_dx[:, columns].addmm_(flat_dy, panel)
            else:
                torch.mm(flat_dy, panel, out=flat_dx[:, columns])
            del panel
    return dx


def _panel(weight: Packed, other: int, near: Tensor) -> int:
    """How many rows (or columns) of `other` values make a panel: a multiple of 64, and 64 at least."""
    budget = PANEL_BYTES.get(near.device.type, PANEL_BYTES["cpu"])
    value_bytes = max(weight.dtype.itemsize, near.element_size())
    return max(64, budget // (other * value_bytes) // 64 * 64)


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return output(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        dx = input_gradient(dy, ctx.weight) if ctx.needs_input_grad[0] else None
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias
