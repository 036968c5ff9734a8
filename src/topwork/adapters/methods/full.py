"""Full fine-tuning: every module is trained as a copy of its own (`module_copy.py`); a head that is tied to the
embedding shares its copy, and is not repeated in the file."""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from topwork.adapters.config import FullConfig
from topwork.adapters.files import own_files
from topwork.adapters.method import Bare, Method, Plan, Preset
from topwork.adapters.methods.places import full_sizes, shared_head
from topwork.adapters.module import AdapterModule
from topwork.adapters.module_copy import ModuleCopy, planned_copy
from topwork.quantization.linear import QuantizedLinear


class TiedHead(AdapterModule):
    """A head whose weight is the embedding's: it runs with the embedding's copy and has nothing of its own but a bias.

    The copy is held in a tuple, so that it is the embedding's part alone that has it as a parameter.
    """

    def __init__(self, base_layer: nn.Module, embedding: ModuleCopy) -> None:
        super().__init__()
        self.embedding = (embedding,)
        self.outputs = embedding.module.get_parameter("weight").shape[0]
        bias = getattr(base_layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())

    def forward(self, y: Tensor, x: Tensor, base_layer: nn.Module) -> Tensor:  # noqa: ARG002
        weight = self.embedding[0].module.get_parameter("weight").to(y.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(y.dtype))

    @torch.no_grad()
    def replacement(self, base_layer: nn.Module) -> nn.Module:
        """A dense head of the base's type, its weight still to be tied to the embedding's."""
        dense = base_layer.dense(torch.float32) if isinstance(base_layer, QuantizedLinear) else base_layer
        if self.bias is not None:
            dense.get_parameter("bias").copy_(self.bias)
        return dense


def full_plan(bare: Bare, config: FullConfig) -> Plan:
    """A copy of every module; a head that is tied to the embedding shares its copy."""
    sizes = full_sizes(bare.seen, config)
    plan = {path: planned_copy(bare.modules[path], sum(own)) for path, own in sizes.items()}
    if shared_head(bare.seen, sizes):
        embedding, head = str(bare.embedding), str(bare.head)
        copied = cache(lambda: ModuleCopy(bare.modules[embedding]))
        plan[embedding] = replace(plan[embedding], make=copied)
        plan[head] = replace(plan[head], make=lambda: TiedHead(bare.modules[head], copied()))
    return plan


FULL = Method(FullConfig, full_plan, own_files(FullConfig), {"full": Preset(rate=0.1)})
