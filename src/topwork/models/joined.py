"""Dense weights of linear layers with one input, held as one tensor: one product instead of several that are each less
than a core likes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from topwork.common.mapped import let_go
from topwork.ops.projection import Projection


@dataclass(frozen=True)
class JoinedWeights:
    """The weights [out, in] of some layers behind one another, and their biases, of which all have one or none has.

    The layers' parameters stay what they are, their values are rows of `whole`: what is written into one is seen in the
    other. A parameter that was given other values (cast, moved, replaced) has left, and then nothing here is used.
    """

    whole: Projection
    rows: tuple[tuple[Tensor, Tensor | None], ...]

    def has(self, weights: Sequence[tuple[object, Tensor | None]]) -> bool:
        """Whether these (weight, bias) are all still rows of it: the same memory, not only the same values."""
        return all(map(_same_memory, (x for pair in weights for x in pair), (x for pair in self.rows for x in pair)))


def _same_memory(one: object, other: Tensor | None) -> bool:
    return one is other if other is None else isinstance(one, Tensor) and one.is_set_to(other)


@torch.no_grad()
def join(layers: Sequence[nn.Linear]) -> JoinedWeights | None:
    """Make the layers' weights and biases rows of one tensor each. None, with nothing changed, where they are of more
    than one type, on more than one device, or only some have a bias."""
    weights = [layer.weight for layer in layers]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    kinds = {(parameter.dtype, parameter.device) for parameter in (*weights, *biases)}
    if len(kinds) > 1 or len(biases) not in (0, len(layers)):
        return None
    weight, bias = _as_one(weights), _as_one(biases) if biases else None
    rows = tuple((layer.weight.detach(), None if bias is None else layer.bias.detach()) for layer in layers)
    return JoinedWeights(Projection(weight, bias), rows)


def _as_one(parameters: Sequence[Tensor]) -> Tensor:
    whole, before = torch.cat(list(parameters)), [parameter.data for parameter in parameters]
    for parameter, rows in zip(parameters, whole.split([len(parameter) for parameter in parameters])):
        parameter.data = rows
    let_go_of_file(before)
    return whole


def let_go_of_file(tensors: Sequence[Tensor]) -> None:
    """Weights lie in a mapped file as they were read, whose pages count as memory until the whole of it is let go of:
    those of tensors that were copied elsewhere are given back at once, or a base would be held twice while its layers
    are joined."""
    let_go((x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors if x.device.type == "cpu")
