"""Linear layers whose value no gradient depends on, and what stands in for them while a layer is recomputed.

In most families the down projection goes straight into the residual sum: its value is needed going forward, and by no
gradient. A stand-in returns zeros that take no memory, and going backward dX = dY W as the layer itself would. Which
layers are such is found by trying, not by name: each linear layer in turn returns NaN, and where every gradient stays
the same to the bit, none depends on it. So families that normalise after the down projection (gemma2, olmo2, glm4) keep
theirs, and where attention and MLP stand side by side (phi), both last projections are left out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from topwork.ops.project import Projection, projection_of

Run = Callable[[Tensor], Any]
"""A layer's forward pass with everything but its hidden states already given."""


def outputs_of(result: Any) -> tuple[Any, ...]:
    """What a layer returned, as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def unneeded_products(layer: nn.Module, run: Run, hidden: Tensor) -> tuple[str, ...]:
    """Paths in the layer of the linear layers whose value changes no gradient."""
    expected = _gradients(layer, run, hidden, ())
    paths = [path for path, module in layer.named_modules() if _can_stand_in(module)]
    free = tuple(path for path in paths if _same(expected, _gradients(layer, run, hidden, (path,))))
    return free if _same(expected, _gradients(layer, run, hidden, free)) else ()


def _gradients(layer: nn.Module, run: Run, hidden: Tensor, without: Sequence[str]) -> list[Tensor | None]:
    """Of the layer's input and its learned weights, for a fixed random gradient of its output; the linear layers at
    `without` return NaN. Nothing where the layer can't run without them."""
    x = hidden.detach().requires_grad_()
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    stand_ins = stand_ins_at(layer, without, torch.nan)
    try:
        with torch.enable_grad(), left_out(stand_ins):
            y = outputs_of(run(x))[0]
    except RuntimeError:  # written in place, for one
        if not without:
            raise
        return []
    if not all(stand_in.replacement.was_called for stand_in in stand_ins):
        return []  # an expert that these tokens did not visit: nothing is known about it
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return list(torch.autograd.grad(y, [x, *parameters], grad, allow_unused=True))


def _same(expected: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> bool:
    """To the bit; NaN is never the same."""
    return len(expected) == len(found) and all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(expected, found)
    )


@dataclass(frozen=True)
class StandIn:
    """A place in a layer, the linear layer that stands there, and what replaces it while recomputing."""

    name: str
    parent: nn.Module
    linear: nn.Module
    replacement: "WithoutProduct"

    def swap(self, there: nn.Module, instead: nn.Module) -> None:
        """Put one in the other's place. Nothing happens where neither is there (an adapter came or went since)."""
        attribute = self.name.rpartition(".")[2]
        if getattr(self.parent, attribute) is there:
            setattr(self.parent, attribute, instead)


class _OnlyBackward(torch.autograd.Function):
    """A linear layer's gradient without its product: y is `value` everywhere, dX is the layer's."""

    @staticmethod
    def forward(ctx, x, linear, features, value):  # type: ignore[no-untyped-def]
        ctx.linear = linear
        return x.new_full((), value).expand(*x.shape[:-1], features)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _input_gradient(ctx.linear, grad), None, None, None


class WithoutProduct(nn.Module):
    """Stands in for a frozen linear layer whose output nobody looks at."""

    def __init__(self, linear: nn.Module, value: float = 0.0) -> None:
        super().__init__()
        self.linear = linear
        self.value = value
        self.was_called = False

    @property
    def stands_for(self) -> nn.Module:
        """The linear layer, for adapters that look at its weight (DoRA's lengths)."""
        return self.linear

    @property
    def weight(self) -> Any:
        """The linear layer's, for code that looks at its type."""
        return self.linear.weight

    @property
    def bias(self) -> Any:
        """The linear layer's."""
        return self.linear.bias

    def projection(self) -> Projection | None:
        """The linear layer's, with a value in its product's place."""
        self.was_called = True
        found = projection_of(self.linear)
        return found and replace(found, instead=self.value)

    def forward(self, x: Tensor) -> Tensor:
        self.was_called = True
        return _OnlyBackward.apply(x, self.linear, _out_features(self.linear), self.value)


def _out_features(linear: nn.Module) -> int:
    return int(linear.nf if isinstance(linear, Conv1D) else linear.out_features)  # type: ignore[arg-type]


def _input_gradient(linear: nn.Module, grad: Tensor) -> Tensor:
    """dX = dY W, with the same product that autograd would run."""
    if type(linear) is nn.Linear:
        return torch.mm(grad.flatten(0, -2), linear.weight).unflatten(0, grad.shape[:-1])
    if isinstance(linear, Conv1D):
        return torch.mm(grad.flatten(0, -2), linear.weight.t()).unflatten(0, grad.shape[:-1])
    return linear.input_gradient(grad)  # type: ignore[operator]


def _can_stand_in(module: nn.Module) -> bool:
    """A linear layer that learns nothing and whose input gradient is known without its product."""
    known = type(module) in (nn.Linear, Conv1D) or hasattr(module, "input_gradient")
    return known and not any(tensor.requires_grad for tensor in chain(module.parameters(), module.buffers()))


def stand_ins_at(layer: nn.Module, paths: Sequence[str], value: float = 0.0) -> tuple[StandIn, ...]:
    found = []
    for path in paths:
        linear = layer.get_submodule(path)
        found.append(StandIn(path, layer.get_submodule(path.rpartition(".")[0]), linear, WithoutProduct(linear, value)))
    return tuple(found)


@contextmanager
def left_out(stand_ins: Sequence[StandIn]) -> Iterator[None]:
    """The stand-ins in their places until the block ends."""
    try:
        for stand_in in stand_ins:
            stand_in.swap(stand_in.linear, stand_in.replacement)
        yield
    finally:
        for stand_in in stand_ins:
            stand_in.swap(stand_in.replacement, stand_in.linear)
