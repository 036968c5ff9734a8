"""The layer around a module of experts: which rows meet which adapter's A and B there."""

import torch
from torch import Tensor, nn

from topwork.adapters.methods.lora.experts import ExpertsLora
from topwork.adapters.module import AdaptedLayer
from topwork.common.errors import AdapterError
from topwork.ops.context import current_batch
from topwork.ops.experts import Experts, Terms, run_experts
from topwork.quantization.kinds import first_of_experts


class AdaptedExperts(AdaptedLayer):
    """Experts, held once, and by name what each adapter has there."""

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        """x [T, d] -> [T, d], of the experts that each token is routed to, indices and weights [T, k]."""
        batch = current_batch().of_rows(len(x))
        if not self._touched(batch.segments):
            found: Tensor = self.base_layer(x, indices, weights)
            return found
        self.check_rows(batch.segments, len(x))
        names = sorted({s.adapter for s in batch.segments if s.adapter is not None and s.adapter in self.adapters})
        numbers = torch.tensor([names.index(s.adapter) if s.adapter in names else len(names) for s in batch.segments])
        lengths = torch.tensor([s.stop - s.start for s in batch.segments])
        by_token = numbers.repeat_interleave(lengths).to(x.device)
        terms = [self._terms(self.part(name)) for name in names]  # type: ignore[arg-type]
        alone = len(names) == 1 and all(segment.adapter == names[0] for segment in batch.segments)
        return run_experts(x, indices, weights, frozen_experts(self.base_layer), terms, by_token, alone)

    def _terms(self, part: ExpertsLora) -> Terms:
        return Terms(part.term(first_of_experts(self.base_layer)), part.term("down_proj"))


def frozen_experts(module: nn.Module) -> Experts:
    """A module of experts as `ops/experts.py` multiplies with it. Raises AdapterError for what is held in few bits."""
    name = first_of_experts(module)
    first, last = (module.get_parameter(one) for one in (name, "down_proj"))
    if not (first.is_floating_point() and first.element_size() > 1):
        raise AdapterError(
            f"experts in {str(first.dtype).removeprefix('torch.')} cannot be adapted; load the base in 16 or 32 bits"
        )
    biases = [getattr(module, f"{one}_bias") if module.has_bias else None for one in (name, "down_proj")]
    turned = [one if module.is_transposed else one.transpose(1, 2) for one in (first, last)]
    gate = module._apply_gate if module.has_gate else module.act_fn
    return Experts(turned[0], turned[1], biases[0], biases[1], gate)  # type: ignore[arg-type]
