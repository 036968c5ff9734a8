"""LoRA that begins from the base's own weights: PiSSA, OLoRA and LoftQ.

PiSSA (Meng et al., arXiv 2404.02948) and OLoRA (Büyükakyüz, arXiv 2406.01775) begin with directions of W, which the
base then lacks: W - s B0 A0 + s B A. The base here is shared and never changes, so the adapter is the difference,

    s (B A - B0 A0) = s [B - B0, B0] [A; A - A0]        rank 2 r, and zero to the bit when fresh

and it is stored as the LoRA of rank 2 r that it is: [A; A0] and [B, -B0], which PEFT reads like any other.

    PiSSA    W = U S V'      B0 = U_r sqrt(S_r / s)     A0 = sqrt(S_r / s) V_r'
    OLoRA    W = Q R         B0 = Q_r                   A0 = R_r
    LoftQ    W - Q(W) = U S V', one iteration (Li et al., arXiv 2310.08659)    B = U_r sqrt(S_r / s), A likewise

PEFT's LoftQ leaves out the division by s, and so adds s times what quantizing lost; at lora_alpha = r they are equal.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.adapters.base_weight import dense_weight
from topwork.adapters.method import Original
from topwork.adapters.methods.lora.lora import Lora
from topwork.adapters.module import FusedTerms
from topwork.common.errors import AdapterError
from topwork.ops.bundles import LowRank
from topwork.quantization.linear import QuantizedLinear


def singular_pair(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], with s B A the best approximation of rank r to `weight` [out, in] in fp32."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * v[:r], u[:, :r] * root


def orthogonal_pair(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """A [r, in] and B [out, r]: the first rows and columns of `weight`'s QR decomposition."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]


PAIRS = {"pissa": singular_pair, "olora": orthogonal_pair}
"""How A0 and B0 are made, by `init_lora_weights`."""


class FromWeight(Lora):
    """PiSSA and OLoRA: A and B beside what they began as, which is frozen."""

    first_A: Tensor
    first_B: Tensor

    def __init__(
        self, in_features: int, out_features: int, r: int, scaling: float, dropout: float, init: str
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, r, scaling, dropout)
        self.pair = PAIRS[init]
        self.register_buffer("first_A", torch.zeros(r, in_features), persistent=False)
        self.register_buffer("first_B", torch.zeros(out_features, r), persistent=False)

    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module, seed: int, path: str) -> None:  # noqa: ARG002
        a, b = self.pair(dense_weight(base_layer), self.lora_A.shape[0], self.scaling)
        for own, first, value in ((self.lora_A, self.first_A, a), (self.lora_B, self.first_B, b)):
            own.copy_(value)
            first.copy_(value)

    def difference(self) -> tuple[Tensor, Tensor]:
        """A' [2 r, in] and B' [out, 2 r] with s B' A' = s (B A - B0 A0), with A's and B's gradients."""
        if self.frozen:
            return self.lora_A, self.lora_B
        a = torch.cat([self.lora_A, self.lora_A - self.first_A])
        return a, torch.cat([self.lora_B - self.first_B, self.first_B], 1)

    @torch.no_grad()
    def freeze(self, base_layer: nn.Module, dtype: torch.dtype) -> None:
        """A' and B' take the places of A and B."""
        self.lora_A, self.lora_B = (nn.Parameter(x) for x in self.difference())
        self.first_A = self.first_B = self.first_A.new_empty(0)
        super().freeze(base_layer, dtype)

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:  # noqa: ARG002
        a, b = self.difference()
        return torch.addmm(y, F.linear(x, a.to(x.dtype)), b.to(x.dtype).t(), alpha=self.scaling)

    def fused_terms(self, start: int, stop: int, base_layer: nn.Module) -> FusedTerms:  # noqa: ARG002
        return FusedTerms((LowRank(start, stop, *self.difference(), self.scaling),))

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """[A; A0] and [B, -B0]."""
        return {
            "lora_A.weight": torch.cat([self.lora_A, self.first_A]),
            "lora_B.weight": torch.cat([self.lora_B, -self.first_B], 1),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        r = self.lora_A.shape[0]
        self.lora_A.copy_(state["lora_A.weight"][:r])
        self.first_A.copy_(state["lora_A.weight"][r:])
        self.lora_B.copy_(state["lora_B.weight"][:, :r])
        self.first_B.copy_(-state["lora_B.weight"][:, r:])

    def delta(self) -> Tensor:
        a, b = self.difference()
        return self.scaling * (b @ a)


class LoftQ(Lora):
    """LoRA that begins as the best approximation to what quantizing its layer lost; as plain LoRA does in a layer that
    is not quantized."""

    def __init__(
        self, in_features: int, out_features: int, r: int, scaling: float, dropout: float, original: Original
    ) -> None:
        super().__init__(in_features, out_features, r, scaling, dropout)
        self.original = original

    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module, seed: int, path: str) -> None:
        super().reset_parameters(base_layer, seed, path)
        if not isinstance(base_layer, QuantizedLinear):
            return
        weight = self.original(path).to(base_layer.weight.device, torch.float32)
        if weight.shape != base_layer.shape:
            raise AdapterError(
                f"{path}: the weight before quantizing is {tuple(weight.shape)}, the quantized one {base_layer.shape}; "
                "give the weights of this very base"
            )
        lost = weight - dense_weight(base_layer)
        a, b = singular_pair(lost, self.lora_A.shape[0], self.scaling)
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)
