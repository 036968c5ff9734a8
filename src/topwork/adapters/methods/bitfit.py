"""BitFit: only biases are trained (Ben Zaken et al., arXiv 2106.10199). y = W x + b with a learned copy of b.

The copy's distance from the base's bias is what is added, so a fresh adapter changes nothing.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from topwork.adapters.config import OWN_TARGETS, BitFitConfig
from topwork.adapters.files import own_files
from topwork.adapters.method import Bare, Method, Plan, Planned
from topwork.adapters.module import AdapterModule, FusedTerms
from topwork.adapters.targets import LINEAR, choose_modules
from topwork.common.errors import AdapterError
from topwork.ops.vectors import Shift


class Bias(AdapterModule):
    """The bias [out] of a linear layer or a norm."""

    merges = ("bias",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.bias = nn.Parameter(base_layer.get_parameter("bias").detach().float().clone())

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:  # noqa: ARG002
        """The distance is added in fp32 and the sum rounded once."""
        return (y + self.distance(base_layer)).to(y.dtype)

    def fused_terms(self, start: int, stop: int, base_layer: nn.Module) -> FusedTerms | None:
        return FusedTerms(shifts=(Shift(start, stop, self.distance(base_layer)),))

    def distance(self, base_layer: nn.Module) -> Tensor:
        """What is added [out] in fp32."""
        return self.bias - base_layer.get_parameter("bias").float()

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, self.bias.detach() if bias is None else self.bias.detach().to(bias)


def bitfit_plan(bare: Bare, config: BitFitConfig) -> Plan:
    """A copy of the bias of every target."""

    def at(path: str) -> Planned:
        module = bare.modules[path]
        return Planned(lambda: Bias(module), module.get_parameter("bias").numel())

    return {path: at(path) for path in bias_targets(bare.modules, bare.head, config)}


def bias_targets(modules: Mapping[str, nn.Module], head: str | None, config: BitFitConfig) -> list[str]:
    """Paths of the modules with a bias that `config` names, or of all. AdapterError where there is none."""
    biased = [path for path, module in modules.items() if _has_bias(module)]
    if not biased:
        raise AdapterError(
            "method bitfit trains biases, and this base has none in its linear layers and norms (llama and most that "
            "followed it have none); take method lora or ia3, or a base with biases (gpt2, opt, phi, qwen2)"
        )
    if config.targets == OWN_TARGETS:
        names = sorted({path.rpartition(".")[2] for path in biased})
        config = config.model_copy(update={"target_modules": names})
    found = [path for path in choose_modules(modules, head, config) if path in set(biased)]
    if not found:
        raise AdapterError(
            f"none of the modules that target_modules {config.target_modules!r} names has a bias; those with one are "
            f"{', '.join(sorted({path.rpartition('.')[2] for path in biased}))}"
        )
    return found


def _has_bias(module: nn.Module) -> bool:
    """A linear layer or a norm, whose bias is added to the last dimension of its output."""
    adds = isinstance(module, (*LINEAR, nn.LayerNorm)) or type(module).__name__.endswith("Norm")
    return adds and isinstance(getattr(module, "bias", None), nn.Parameter) and torch.is_floating_point(module.bias)  # type: ignore[arg-type]


BITFIT = Method(BitFitConfig, bitfit_plan, own_files(BitFitConfig))
