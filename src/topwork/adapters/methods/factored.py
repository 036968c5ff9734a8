"""Updates that are a product of two factors which follow from what is learned: y + s B A x, A [n, in], B [out, n].

LoRA learns A and B; VeRA (`vera.py`), LoHa (`loha.py`) and LoKr (`lokr.py`) learn less, from which both are made in
every pass. They run as LoRA's terms do (`ops/bundles.py`), so the segments of a stream may be of any of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.adapters.module import AdapterModule, FusedTerms
from topwork.ops.bundles import LowRank


class Factored(AdapterModule):
    """What is learned at one linear layer, and the factors that follow from it."""

    merges = ("weight",)
    scaling = 1.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [n, in] and B [out, n] in fp32, with the gradients of what they are made of."""
        raise NotImplementedError

    @property
    def setting(self) -> float:
        return self.scaling

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:  # noqa: ARG002
        """y + s B A x for x [n, in] and y [n, out]; A and B are multiplied in x's type."""
        a, b = self.factors()
        return torch.addmm(y, F.linear(x, a.to(x.dtype)), b.to(x.dtype).t(), alpha=self.scaling)

    def fused_terms(self, start: int, stop: int, base_layer: nn.Module) -> FusedTerms | None:  # noqa: ARG002
        return FusedTerms((LowRank(start, stop, *self.factors(), self.scaling),))

    def delta(self) -> Tensor:
        """s B A [out, in] in fp32."""
        a, b = self.factors()
        return self.scaling * (b @ a)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta().to(weight.device), bias


def as_factors(update: Tensor) -> tuple[Tensor, Tensor]:
    """A whole matrix [out, in] as a product: itself and the identity, of the smaller of its sides."""
    outputs, inputs = update.shape
    if outputs <= inputs:
        return update, torch.eye(outputs, device=update.device, dtype=update.dtype)
    return torch.eye(inputs, device=update.device, dtype=update.dtype), update
