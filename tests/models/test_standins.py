"""What is left out while recomputing was really tried: a layer that no token visited is not known to be unneeded."""

import torch
from torch import Tensor, nn

from topwork.models.standins import unneeded_products


class Experts(nn.Module):
    """A residual block of two experts, each an up and a down projection; tokens go to the one that is chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in range(2))
        self.chosen = 0
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        expert = self.experts[self.chosen]
        return x + expert["down"](torch.relu(expert["up"](x)))


def test_only_what_was_tried_is_left_out() -> None:
    torch.manual_seed(0)
    layer = Experts()
    assert unneeded_products(layer, layer, torch.randn(3, 4)) == ("experts.0.down",)
    layer.chosen = 1
    assert unneeded_products(layer, layer, torch.randn(3, 4)) == ("experts.1.down",)
