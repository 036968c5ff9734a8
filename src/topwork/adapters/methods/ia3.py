"""(IA)3: a learned vector times what a layer gives, or times what it is given (Liu et al., arXiv 2205.05638).

    y = l * (W x + bias)        keys and values        l [out, 1]
    y = W (l * x) + bias        feedforward modules    l [1, in]

l begins as ones, so a fresh adapter changes nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn

from topwork.adapters.config import OWN_TARGETS, Ia3Config
from topwork.adapters.files import Files, Grafted, has_conv1d, names_of, peft_keys, sorted_or_none
from topwork.adapters.method import Bare, Method, Plan, Planned, Preset
from topwork.adapters.methods.places import ia3_sizes, ia3_targets
from topwork.adapters.module import AdapterModule, FusedTerms
from topwork.adapters.peft_options import ia3_options
from topwork.ops.vectors import Gain
from topwork.quantization.kinds import features


class Ia3(AdapterModule):
    """The learned vector at one linear layer: [out, 1], or [1, in] where it scales the inputs."""

    def __init__(self, in_features: int, out_features: int, scales_inputs: bool) -> None:
        super().__init__()
        self.scales_inputs = scales_inputs
        self.ia3_l = nn.Parameter(torch.ones((1, in_features) if scales_inputs else (out_features, 1)))

    @property
    def setting(self) -> bool:
        return self.scales_inputs

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:
        """The vector is multiplied in fp32 and the product rounded once, as in PEFT."""
        if not self.scales_inputs:
            return (y * self.ia3_l.flatten()).to(y.dtype)
        scaled: Tensor = base_layer((x * self.ia3_l).to(x.dtype))
        return scaled

    def fused_terms(self, start: int, stop: int, base_layer: nn.Module) -> FusedTerms | None:  # noqa: ARG002
        gain = Gain(start, stop, self.ia3_l.flatten())
        return FusedTerms(input_gains=(gain,)) if self.scales_inputs else FusedTerms(gains=(gain,))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = self.ia3_l.float().to(weight.device)
        scaled = bias if bias is None or self.scales_inputs else (bias * factor.flatten()).to(bias.dtype)
        return weight * factor, scaled


def ia3_plan(bare: Bare, config: Ia3Config) -> Plan:
    """A vector at every target, for its outputs or its inputs."""
    targets, sizes = ia3_targets(bare.seen, config), ia3_sizes(bare.seen, config)

    def at(path: str, scales_inputs: bool) -> Planned:
        inputs, outputs = features(bare.modules[path])
        return Planned(lambda: Ia3(inputs, outputs, scales_inputs), sum(sizes[path]), scales_inputs)

    return {path: at(path, last) for path, last in targets.items()}


def _keys(adapter: Grafted[Ia3Config]) -> dict[str, Any]:
    """Names are written out, excluded modules left out of them already."""
    modules = adapter.modules
    parts = {path: part for path, part in adapter.parts.items() if isinstance(part, Ia3)}
    last = [path for path, part in parts.items() if part.scales_inputs]
    targets, feedforward = names_of(parts, modules), names_of(last, modules)
    endings = tuple(feedforward)  # as PEFT looks for them: any ending, and some of the targets by name
    found = {path for path in parts if endings and path.endswith(endings)}
    if found != set(last) or not set(feedforward) <= set(targets):
        targets, feedforward = sorted(parts), sorted(last)
    return {
        **peft_keys("IA3"),
        "target_modules": targets,
        "feedforward_modules": feedforward,
        "exclude_modules": None,
        "modules_to_save": sorted_or_none(adapter.config.modules_to_save),
        "fan_in_fan_out": has_conv1d(modules, parts),
        "init_ia3_weights": True,
    }


IA3 = Method(
    Ia3Config,
    ia3_plan,
    Files("IA3", _keys, ia3_options),
    {"ia3": Preset({"adapter.target_modules": OWN_TARGETS}, rate=10)},
)
