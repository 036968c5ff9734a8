"""LoKr: the Kronecker product of a small matrix and another one, often of low rank (Yeh et al., arXiv 2309.14859).

    y = W x + s (W1 o W2) x        W1 [a, b], W2 [c, d], a c = out, b d = in, s = alpha / r

Where W2 is L R of rank r, W1 o L R is (W1 o L)(I o R), of rank b r, and (I o L)(W1 o R), of rank a r: the smaller is
taken. W1 begins at zero (or what it is multiplied from), so a fresh adapter changes nothing.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from topwork.adapters.config import LokrConfig
from topwork.adapters.files import Files, Grafted
from topwork.adapters.method import Bare, Method, Plan, Planned
from topwork.adapters.methods.factored import Factored, as_factors
from topwork.adapters.methods.factored_places import lokr_shapes, lokr_sizes
from topwork.adapters.methods.loha import lycoris_keys
from topwork.adapters.module import path_seed
from topwork.adapters.peft_options_other import lokr_options


class Lokr(Factored):
    """The two matrices at one linear layer, whole or as products, by PEFT's names."""

    def __init__(self, inputs: int, outputs: int, config: LokrConfig) -> None:
        super().__init__()
        self.inputs, self.outputs, self.scaling = inputs, outputs, config.alpha / config.r
        for name, shape in lokr_shapes(inputs, outputs, config).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module, seed: int, path: str) -> None:  # noqa: ARG002
        generator = torch.Generator().manual_seed(path_seed(seed, path))
        for name, parameter in self.named_parameters():
            if name in ("lokr_w1", "lokr_w1_a"):
                parameter.zero_()
            else:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        values = dict(self.named_parameters())
        first = values["lokr_w1"] if "lokr_w1" in values else values["lokr_w1_a"] @ values["lokr_w1_b"]
        if "lokr_w2" in values:
            return as_factors(torch.kron(first, values["lokr_w2"]))
        left, right = values["lokr_w2_a"], values["lokr_w2_b"]
        side = min(first.shape)
        if side * len(right) >= min(self.inputs, self.outputs):
            return as_factors(torch.kron(first, left @ right))
        same = torch.eye(side, device=first.device, dtype=first.dtype)
        if first.shape[1] == side:
            return torch.kron(same, right), torch.kron(first, left)
        return torch.kron(first, right), torch.kron(same, left)


def lokr_plan(bare: Bare, config: LokrConfig) -> Plan:
    """Two matrices at every target."""

    def at(path: str, values: int) -> Planned:
        module = bare.seen.by_path[path]
        inputs, outputs = module.columns, module.rows
        return Planned(lambda: Lokr(inputs, outputs, config), values, config.alpha / config.r)

    return {path: at(path, sum(sizes)) for path, sizes in lokr_sizes(bare.seen, config).items()}


def _keys(adapter: Grafted[LokrConfig]) -> dict[str, Any]:
    config = adapter.config
    return {
        **lycoris_keys(adapter, "LOKR", Lokr),
        "rank_dropout_scale": False,
        "decompose_both": config.decompose_both,
        "decompose_factor": config.decompose_factor,
    }


LOKR = Method(LokrConfig, lokr_plan, Files("LOKR", _keys, lokr_options))
