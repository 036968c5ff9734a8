"""LoRA on raw parameters (`target_parameters`), as PEFT's ParamWrapper means and writes it: on experts' matrices, which
lie in one tensor, and on a router's weight.

    experts   W[e] + s B[e] A[e]      A [E r, in] expert by expert; B [out, r E], the experts of a rank side by side
    router    W + s B A               as at a linear layer

The sum W + s B A is never made for experts: rows are multiplied with B and A of their own adapter and expert
(`ops/experts.py`). A router is small, and what it does with its weight is its own, so it runs with the sum, rounded to
the weight's type as merging rounds it. PEFT wraps a module once for each parameter, so that of two the one that stands
first in the module is written with `base_layer.` in front.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from topwork.adapters.methods.lora.lora import Lora
from topwork.adapters.module import AdapterModule, hold_in, path_seed
from topwork.common.kinds import Matrix
from topwork.ops.experts import ExpertTerm


class ExpertsLora(AdapterModule):
    """A and B of each expert, at one or more of a module's matrices.

    names      of the parameters, in the module's order
    scalings   s of each
    """

    def __init__(
        self, shapes: Sequence[Matrix], ranks: Sequence[int], scalings: Sequence[float],
        transposed: bool, gaussian: bool = False,
    ) -> None:  # fmt: skip
        """`transposed` where the parameters are held as [E, in, out]."""
        super().__init__()
        self.names = tuple(shape[0] for shape in shapes)
        self.merges = self.names
        self.experts = shapes[0][1]
        self.scalings, self.ranks = tuple(scalings), tuple(ranks)
        self.transposed, self.gaussian = transposed, gaussian
        self.lora_A = nn.ParameterDict({
            name: nn.Parameter(torch.empty(r * experts, inputs)) for r, (name, experts, inputs, _) in zip(ranks, shapes)
        })  # fmt: skip
        self.lora_B = nn.ParameterDict({
            name: nn.Parameter(torch.zeros(outputs, r * held)) for r, (name, held, _, outputs) in zip(ranks, shapes)
        })  # fmt: skip

    @property
    def setting(self) -> tuple[float, ...]:
        """The scales."""
        return self.scalings

    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module, seed: int, path: str) -> None:  # noqa: ARG002
        """Draw A, zero B."""
        for name, r in zip(self.names, self.ranks):
            generator = torch.Generator().manual_seed(path_seed(seed, f"{path}.{name}"))
            a = torch.empty(self.lora_A[name].shape)
            if self.gaussian:
                a.normal_(std=1 / r, generator=generator)
            else:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            self.lora_A[name].copy_(a)
            self.lora_B[name].zero_()

    def term(self, name: str) -> ExpertTerm | None:
        """What rows that meet this parameter get added."""
        if name not in self.names:
            return None
        return ExpertTerm(self.lora_A[name], self.lora_B[name], self.experts, self.scalings[self.names.index(name)])

    def freeze(self, base_layer: nn.Module, dtype: torch.dtype) -> None:
        super().freeze(base_layer, dtype)
        for parameter in self.parameters():
            hold_in(parameter, base_layer, dtype)

    def tensors(self) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for depth, name in enumerate(reversed(self.names)):
            inner = "base_layer." * depth
            found |= {f"{inner}lora_A.weight": self.lora_A[name], f"{inner}lora_B.weight": self.lora_B[name]}
        return found

    def delta(self, name: str, expert: int) -> Tensor:
        """s B A [out, in] of one expert in fp32; [in, out] where the parameter lies so."""
        r, at = self.ranks[self.names.index(name)], self.names.index(name)
        a = self.lora_A[name].float()[expert * r : (expert + 1) * r]
        b = self.lora_B[name].float()[:, expert :: self.experts]
        whole = self.scalings[at] * (b @ a)
        return whole.t() if self.transposed else whole

    def merged_parameter(self, name: str, value: Tensor) -> Tensor:
        for expert in range(self.experts):
            value[expert] += self.delta(name, expert).to(value.device)
        return value

    def merged_piece(self, name: str, value: Tensor, expert: int, part: int) -> Tensor:
        rows = len(value)
        return value.add_(self.delta(name, expert)[part * rows : (part + 1) * rows])


class RouterLora(Lora):
    """A and B at a router's weight, or another's that is called with rows alone and does more with them than a linear
    layer."""

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:  # noqa: ARG002
        """All that the module gives of x [n, in]: not of one tensor alone, where it gives several."""
        weight = base_layer.get_parameter("weight")
        whole = (weight.float() + self.delta().to(weight.device)).to(weight.dtype)
        found: Tensor = functional_call(base_layer, {"weight": whole}, (x,))
        return found

    def fused_terms(self, start: int, stop: int, base_layer: nn.Module) -> None:  # noqa: ARG002
        return None

    def freeze(self, base_layer: nn.Module, dtype: torch.dtype) -> None:
        """A and B stay in fp32, in which the sum is made."""
        AdapterModule.freeze(self, base_layer, dtype)
