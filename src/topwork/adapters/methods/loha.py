"""LoHa: the elementwise product of two low-rank matrices (Hyeon-Woo et al., arXiv 2108.06098).

    y = W x + s ((A1 B1) * (A2 B2)) x        A1, A2 [out, r], B1, B2 [r, in], s = alpha / r

Entry (i, j) is the sum over k, l of A1[i, k] A2[i, l] B1[k, j] B2[l, j], so it is a product of rank r^2, whose factors
are the products of every two columns and of every two rows. B2 begins at zero, so a fresh adapter changes nothing.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from topwork.adapters.config import LohaConfig
from topwork.adapters.files import Files, Grafted, names_of, peft_keys, sorted_or_none
from topwork.adapters.method import Bare, Method, Plan, Planned
from topwork.adapters.methods.factored import Factored, as_factors
from topwork.adapters.methods.factored_places import loha_sizes
from topwork.adapters.module import path_seed
from topwork.adapters.peft_options_other import loha_options


class Loha(Factored):
    """The two pairs at one linear layer."""

    def __init__(self, inputs: int, outputs: int, r: int, scaling: float) -> None:
        super().__init__()
        self.hada_w1_a = nn.Parameter(torch.empty(outputs, r))
        self.hada_w1_b = nn.Parameter(torch.empty(r, inputs))
        self.hada_w2_a = nn.Parameter(torch.empty(outputs, r))
        self.hada_w2_b = nn.Parameter(torch.zeros(r, inputs))
        self.scaling = scaling

    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module, seed: int, path: str) -> None:  # noqa: ARG002
        generator = torch.Generator().manual_seed(path_seed(seed, path))
        for parameter in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
        self.hada_w2_b.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        r, (outputs, inputs) = self.hada_w1_b.shape[0], (len(self.hada_w1_a), self.hada_w1_b.shape[1])
        if r * r >= min(inputs, outputs):
            return as_factors((self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b))
        rows = (self.hada_w1_b[:, None] * self.hada_w2_b[None]).flatten(0, 1)
        return rows, (self.hada_w1_a[:, :, None] * self.hada_w2_a[:, None]).flatten(1)


def loha_plan(bare: Bare, config: LohaConfig) -> Plan:
    """Two pairs at every target."""

    def at(path: str, values: int) -> Planned:
        module = bare.seen.by_path[path]
        inputs, outputs, scaling = module.columns, module.rows, config.alpha / config.r
        return Planned(lambda: Loha(inputs, outputs, config.r, scaling), values, scaling)

    return {path: at(path, sum(sizes)) for path, sizes in loha_sizes(bare.seen, config).items()}


def lycoris_keys(adapter: Grafted[Any], peft_type: str, kind: type[nn.Module]) -> dict[str, Any]:
    """What PEFT writes for LoHa and LoKr alike."""
    config, paths = adapter.config, [path for path, part in adapter.parts.items() if isinstance(part, kind)]
    return {
        **peft_keys(peft_type),
        "r": config.r,
        "alpha": config.alpha,
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "use_effective_conv2d": False,
        "target_modules": names_of(paths, adapter.modules),
        "exclude_modules": None,
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": sorted_or_none(config.modules_to_save),
    }


def _keys(adapter: Grafted[LohaConfig]) -> dict[str, Any]:
    return lycoris_keys(adapter, "LOHA", Loha)


LOHA = Method(LohaConfig, loha_plan, Files("LOHA", _keys, loha_options))
