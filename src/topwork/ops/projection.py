"""Frozen linear layers side by side, dense or packed, with what adapters have at each, and their products."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from topwork.ops.bundles import LowRank
from topwork.ops.grouped import Addend, Product, grouped_products
from topwork.ops.packed import Packed
from topwork.ops.quantized_linear import Terms, input_gradient, write_output
from topwork.ops.vectors import Gain, Shift


@dataclass(frozen=True)
class Projection:
    """One linear layer: frozen weight [out, in], bias [out], what adapters multiply its inputs by, add to its product,
    and multiply that by. No row has more than one gain on either side."""

    weight: Tensor | Packed
    bias: Tensor | None = None
    terms: tuple[LowRank, ...] = ()
    gains: tuple[Gain, ...] = ()
    shifts: tuple[Shift, ...] = ()
    input_gains: tuple[Gain, ...] = ()

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0])


def projection_of(module: nn.Module | None) -> Projection | None:
    """What a module adds up to as a frozen linear layer with adapters' parts for the current batch; None where it is
    more than that. Modules other than nn.Linear tell by a method `projection()`."""
    if type(module) is nn.Linear:
        weight, bias = module.weight, module.bias
        learns = weight.requires_grad or (bias is not None and bias.requires_grad)
        return None if learns else Projection(weight, bias)
    tell: Callable[[], Projection | None] | None = getattr(module, "projection", None)
    return tell() if tell is not None else None


Placed = list[tuple[Projection, slice]]
"""Projections side by side, each with its columns in the group's output."""


def side_by_side(group: Sequence[Projection]) -> Placed:
    """Each where the ones before it end."""
    placed, at = [], 0
    for projection in group:
        placed.append((projection, slice(at, at + projection.outputs)))
        at += projection.outputs
    return placed


def biases(n: Tensor, layer: Projection, rows: slice) -> tuple[Addend, ...]:
    """Some of a layer's bias as an addend of its product: 1 bias'."""
    if layer.bias is None:
        return ()
    return (Addend(n.new_ones(1, 1).expand(n.shape[0], 1), layer.bias[None, rows], 0, 0),)


def begun(base: Placed, out: Tensor) -> bool:
    """Whether there are biases, with which `out` begins then, and zeros beside them: so a term is rounded with its bias
    and not lost on a product, and no term at all leaves what the base alone would be, to the bit."""
    if all(projection.bias is None for projection, _ in base):
        return False
    for projection, columns in base:
        out[:, columns] = 0 if projection.bias is None else projection.bias
    return True


def base_products(n: Tensor, base: Placed, out: Tensor, add: bool) -> None:
    """Products and biases of all layers; with `add` products on top of what `out` holds, which is rounded with each."""
    for projection, columns in base:
        part, bias = out[:, columns], projection.bias
        if isinstance(projection.weight, Packed):
            write_output(n, projection.weight, None if add else bias, part, add)
        elif add:
            part.addmm_(n, projection.weight.t())
        elif bias is None:
            torch.mm(n, projection.weight.t(), out=part)
        else:
            torch.addmm(bias, n, projection.weight.t(), out=part)


def base_gradient(
    dout: Tensor, base: Placed, dn: Tensor, here: bool, add: bool = False, terms: Terms | None = None
) -> None:  # fmt: skip
    """dn [T, in] = dout W of the whole group, by `grouped_products` where that is best made `here`; with `add` on top
    of what dn holds. `terms` join the last layer's product before it is rounded."""
    for number, (projection, columns) in enumerate(base):
        part, weight = dout[:, columns], projection.weight
        own = terms if number == len(base) - 1 else None
        if isinstance(weight, Packed):
            input_gradient(part, weight, dn, add, own)
        elif here:
            of_terms = own(slice(0, dn.shape[1])) if own is not None else ()
            grouped_products([Product(part, weight, dn, beta=int(add), addends=of_terms)])
        elif add:
            dn.addmm_(part, weight)
        else:
            torch.mm(part, weight, out=dn)
        add = True
