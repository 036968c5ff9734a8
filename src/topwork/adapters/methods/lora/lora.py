"""LoRA: h = W x + s * B (A dropout(x)), A [r, in], B [out, r] (Hu et al., arXiv 2106.09685).

s = alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski, arXiv 2312.03732). B begins at zero, so a fresh adapter
changes nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.adapters.module import AdapterModule, FusedTerms, hold_in, path_seed
from topwork.ops.bundles import LowRank


class Lora(AdapterModule):
    """A and B at one linear layer."""

    merges = ("weight",)

    def __init__(
        self, in_features: int, out_features: int, r: int, scaling: float, dropout: float = 0.0, gaussian: bool = False
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        self.scaling = scaling
        self.dropout = dropout
        self.gaussian = gaussian

    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module, seed: int, path: str) -> None:  # noqa: ARG002
        """Draw A, zero B."""
        generator = torch.Generator().manual_seed(path_seed(seed, path))
        a = torch.empty(self.lora_A.shape)
        if self.gaussian:
            a.normal_(std=1 / a.shape[0], generator=generator)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_A.copy_(a)
        self.lora_B.zero_()

    @property
    def setting(self) -> float:
        return self.scaling

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:  # noqa: ARG002
        """y + s B A x for x [n, in] and y [n, out]; A and B are multiplied in x's type."""
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return torch.addmm(y, F.linear(x, a), b.t(), alpha=self.scaling)

    def fused_terms(self, start: int, stop: int, base_layer: nn.Module) -> FusedTerms | None:  # noqa: ARG002
        return FusedTerms((LowRank(start, stop, self.lora_A, self.lora_B, self.scaling),))

    def freeze(self, base_layer: nn.Module, dtype: torch.dtype) -> None:
        super().freeze(base_layer, dtype)
        for parameter in (self.lora_A, self.lora_B):
            hold_in(parameter, base_layer, dtype)

    def tensors(self) -> dict[str, nn.Parameter]:
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}

    def delta(self) -> Tensor:
        """s B A [out, in] in fp32."""
        return self.scaling * (self.lora_B.float() @ self.lora_A.float())

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta().to(weight.device), bias
