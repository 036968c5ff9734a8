"""An adapter method of one's own, whole in one file and nowhere in src: y = (1 + g) y at every target, g [out]."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from topwork.adapters.config import Targeted
from topwork.adapters.files import own_files
from topwork.adapters.method import Bare, Method, Plan, Planned
from topwork.adapters.methods.table import METHODS
from topwork.adapters.module import AdapterModule
from topwork.adapters.targets import find_targets


class ToyConfig(Targeted):
    method: Literal["toy"] = "toy"
    """Learned vectors times what layers give."""
    strength: float = Field(1.0, gt=0)
    """g is multiplied by so much."""


class Toy(AdapterModule):
    """The learned vector [out] at one linear layer."""

    def __init__(self, outputs: int, strength: float) -> None:
        super().__init__()
        self.toy_g = nn.Parameter(torch.zeros(outputs))
        self.strength = strength

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:
        return y + y * (self.strength * self.toy_g).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = 1 + self.strength * self.toy_g.detach().to(weight.device)
        return weight * factor[:, None], None if bias is None else (bias * factor).to(bias.dtype)


def toy_plan(bare: Bare, config: ToyConfig) -> Plan:
    """A vector at every target."""

    def at(path: str) -> Planned:
        outputs = bare.seen.by_path[path].rows
        return Planned(lambda: Toy(outputs, config.strength), outputs)

    return {path: at(path) for path in find_targets(bare.seen, config)}


TOY = Method(ToyConfig, toy_plan, own_files(ToyConfig))
WITH_TOY = METHODS | {"toy": TOY}
"""Every method, and this one."""
