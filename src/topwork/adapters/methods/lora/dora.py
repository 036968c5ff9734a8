"""DoRA: each row of W + s B A keeps its direction, and its length is learned apart (Liu et al., arXiv 2402.09353).

    y = f * (W x + s B A x) + bias        f = m / n,  n = |W + s B A| row by row, without a gradient (section 4.3)

m begins as |W|, by the same sum, so a fresh f is one to the bit. n is computed in every pass, for the work of r tokens
(`ops/row_lengths.py`: no dense W + s B A), and kept only while it is held (`models/held.py`). With dropout x is dropped
in W x too, but only for what f adds, as in PEFT: y = W x + bias + (f - 1) W dropout(x) + f s B A dropout(x).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.adapters.base_weight import product, row_panels, weight_times
from topwork.adapters.methods.lora.lora import Lora
from topwork.adapters.module import FusedTerms
from topwork.ops.bundles import LowRank
from topwork.ops.row_lengths import row_lengths
from topwork.ops.rows import rows_at_once
from topwork.ops.vectors import Gain


class Dora(Lora):
    """LoRA's A and B, and the rows' lengths m [out]."""

    squares: Tensor

    def __init__(
        self, in_features: int, out_features: int, r: int, scaling: float, dropout: float = 0.0, gaussian: bool = False
    ) -> None:
        super().__init__(in_features, out_features, r, scaling, dropout, gaussian)
        self.lora_magnitude_vector = nn.Parameter(torch.ones(out_features))
        self.register_buffer("squares", torch.ones(out_features), persistent=False)
        self._holds = False
        self._held: Tensor | None = None

    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module, seed: int, path: str) -> None:
        super().reset_parameters(base_layer, seed, path)
        for rows, panel in row_panels(base_layer):  # few rows at a time: the heap does not fill large holes again
            parts = [part.float().square().sum(1) for part in panel.split(rows_at_once(panel))]
            self.squares[rows] = torch.cat(parts)
        self.lora_magnitude_vector.copy_(self.squares.sqrt())

    def lengths(self, base_layer: nn.Module) -> Tensor:
        """n [out] in fp32, without a gradient; computed once between `hold` and `release`, which a pass that takes
        gradients is too: an update will follow. Frozen, once and for all."""
        if self.frozen and self._held is not None:
            return self._held
        if torch.is_grad_enabled():
            self.release()
        if not self._holds:
            return self._computed_lengths(base_layer)
        if self._held is None:
            self._held = self._computed_lengths(base_layer)
        return self._held

    def hold(self) -> None:
        if not self.frozen:
            self._holds, self._held = True, None

    def release(self) -> None:
        if not self.frozen:
            self._holds, self._held = False, None

    def freeze(self, base_layer: nn.Module, dtype: torch.dtype) -> None:
        self._held = self._computed_lengths(base_layer)  # of A and B as they were
        self.squares = self.squares.new_empty(0)
        super().freeze(base_layer, dtype)

    def held(self) -> Iterator[Tensor]:
        yield from super().held()
        if self._held is not None:
            yield self._held

    def factor(self, base_layer: nn.Module) -> Tensor:
        """f [out] in fp32, with m's gradient."""
        return self.lora_magnitude_vector / self.lengths(base_layer)

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:
        """f is multiplied in fp32 and the product rounded once, as in `ops/gain.py`: as y + (f - 1) y a small f leaves
        y's own rounding, which is 1 / f times as large beside f y."""
        a, b, factor = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype), self.factor(base_layer)
        inner = F.linear(x, a)
        updated = torch.addmm(y, inner, b.t(), alpha=self.scaling)
        if self.dropout and self.training:
            dropped = torch.addmm(product(base_layer, x), inner, b.t(), alpha=self.scaling)
            return (updated + dropped * (factor - 1)).to(y.dtype)
        bias = getattr(base_layer, "bias", None)
        gained = updated * factor
        return (gained if bias is None else gained - bias * (factor - 1)).to(y.dtype)

    def fused_terms(self, start: int, stop: int, base_layer: nn.Module) -> FusedTerms | None:
        if self.dropout and self.training:
            return None
        term = LowRank(start, stop, self.lora_A, self.lora_B, self.scaling)
        return FusedTerms((term,), (Gain(start, stop, self.factor(base_layer), with_bias=False),))

    def tensors(self) -> dict[str, nn.Parameter]:
        return {**super().tensors(), "lora_magnitude_vector": self.lora_magnitude_vector}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self._held = None

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        whole = weight + self.delta().to(weight.device)
        return whole * (self.lora_magnitude_vector.to(weight.device) / whole.norm(dim=1))[:, None], bias

    @torch.no_grad()
    def _computed_lengths(self, base_layer: nn.Module) -> Tensor:
        """In a 16-bit base W A' is a product in 16 bits: it is as exact as the layer's own, and n far more."""
        a, b = self.lora_A.float(), self.lora_B.float()
        return row_lengths(self.squares, b, weight_times(base_layer, a.t()), a @ a.t(), self.scaling)
