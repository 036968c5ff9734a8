"""Biases beside LoRA, as PEFT trains them: the base's own (`bias: lora_only`, `all`), and one of B (`lora_bias`).

    y = W x + b' + s (B A x + c)        DoRA: y = f * (W x + s B A x) + b'

b' begins as the base's b and c as zeros, so a fresh adapter changes nothing.
"""

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from topwork.adapters.methods.lora.bias_places import AFTER_B, OF_BASE
from topwork.adapters.methods.lora.dora import Dora
from topwork.adapters.methods.lora.lora import Lora
from topwork.adapters.module import FusedTerms
from topwork.common.errors import AdapterError
from topwork.ops.vectors import Shift


class BiasedLora(Lora):
    """LoRA that is made first, and then given the biases [out] that it learns."""

    merges = ("weight", "bias")  # type: ignore[assignment]  # more than LoRA alone
    of_base: nn.Parameter | None
    after_b: nn.Parameter | None
    base_has_one = True

    def __init__(
        self, in_features: int, out_features: int, r: int, scaling: float, dropout: float = 0.0, gaussian: bool = False
    ) -> None:
        super().__init__(in_features, out_features, r, scaling, dropout, gaussian)
        self.register_parameter("of_base", None)
        self.register_parameter("after_b", None)

    def with_biases(self, base_layer: nn.Module, names: tuple[str, ...]) -> Self:
        """Itself, with those of `bias_places.py`."""
        bias = getattr(base_layer, "bias", None)
        self.base_has_one = bias is not None
        if OF_BASE in names:
            self.of_base = nn.Parameter(base_layer.get_parameter("bias").detach().float().clone())
        if AFTER_B in names:
            self.after_b = nn.Parameter(torch.zeros(self.lora_B.shape[0]))
        return self

    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module, seed: int, path: str) -> None:
        super().reset_parameters(base_layer, seed, path)
        if self.of_base is not None:
            self.of_base.copy_(base_layer.get_parameter("bias"))
        if self.after_b is not None:
            self.after_b.zero_()

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:
        """What the biases add is added in fp32."""
        return (super().forward(y, x, base_layer) + self.distance(base_layer)).to(y.dtype)

    def fused_terms(self, start: int, stop: int, base_layer: nn.Module) -> FusedTerms | None:
        fused = super().fused_terms(start, stop, base_layer)
        if fused is None or fused.gains:  # a gain would multiply what is added here
            return None
        return replace(fused, shifts=(Shift(start, stop, self.distance(base_layer)),))

    def distance(self, base_layer: nn.Module) -> Tensor:
        """What is added to the base's bias [out], in fp32."""
        after = 0.0 if self.after_b is None else self.scaling * self.after_b
        if self.of_base is None:
            assert isinstance(after, Tensor)
            return after
        return self.of_base - base_layer.get_parameter("bias").float() + after

    def tensors(self) -> dict[str, nn.Parameter]:
        own = {OF_BASE: self.of_base, AFTER_B: self.after_b}
        return {**super().tensors(), **{name: bias for name, bias in own.items() if bias is not None}}

    def refuse_lost(self, path: str) -> None:
        """AdapterError where merging would lose a bias, for the base's module at `path` has none that could hold it."""
        if self.after_b is not None and not self.base_has_one:
            raise AdapterError(
                f"lora_bias adds a bias to {path}, which has none that could hold it, so the adapter cannot be merged "
                "or combined; use it with its base"
            )

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        whole, _ = super().merged(weight, None)
        if bias is None:
            return whole, None
        found = (bias if self.of_base is None else self.of_base.detach()).float().to(weight.device)
        added = 0.0 if self.after_b is None else self.scaling * self.after_b.detach().to(weight.device)
        return whole, (found + added).to(torch.promote_types(bias.dtype, torch.float32))


class BiasedDora(BiasedLora, Dora):
    """DoRA with biases, whose own is none of what its lengths multiply."""
