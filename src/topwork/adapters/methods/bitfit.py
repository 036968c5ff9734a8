"""BitFit: only biases are trained (Ben Zaken et al., arXiv 2106.10199). y = W x + b with a learned copy of b.

The copy's distance from the base's bias is what is added, so a fresh adapter changes nothing.
"""

from torch import Tensor, nn

from topwork.adapters.config import BitFitConfig
from topwork.adapters.files import own_files
from topwork.adapters.method import Bare, Method, Plan, Planned
from topwork.adapters.methods.places import bitfit_sizes
from topwork.adapters.module import AdapterModule, FusedTerms
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

    def at(path: str, size: int) -> Planned:
        module = bare.modules[path]
        return Planned(lambda: Bias(module), size)

    return {path: at(path, size) for path, (size,) in bitfit_sizes(bare.seen, config).items()}


BITFIT = Method(BitFitConfig, bitfit_plan, own_files(BitFitConfig))
