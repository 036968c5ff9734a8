"""An adapter as C runs it (`ops/decode.py`): its parts by place, in the base's type, frozen.

Scales stay apart from B and are multiplied in fp32, as in training: folded in they would be rounded with it.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from topwork.adapters.methods.full import TiedHead
from topwork.adapters.methods.lora.embedding import EmbeddingLora, HeadRows, TrainedTokens
from topwork.adapters.methods.virtual import VirtualTokens
from topwork.adapters.module import AdaptedLayer, AdapterModule
from topwork.adapters.module_copy import ModuleCopy
from topwork.models.program import Plan
from topwork.ops import decode as c

AfterHead = Callable[[Tensor, Tensor], None]
"""Takes hidden states [n, d] and adds to logits [n, V], row by row."""


@dataclass
class CompiledAdapter:
    """`parts`: a `Part` for each of the plan's places. `rank`: the largest. `embeds_by_row`: whether rows of its
    embedding have to be made one by one. `after_head`: what it adds to the logits that no product does."""

    parts: "ctypes.Array[c.Part]"
    rank: int = 0
    input_gains: bool = False
    embeds_by_row: bool = False
    after_head: AfterHead | None = None
    kept: c.Kept = field(default_factory=c.Kept)

    @property
    def address(self) -> int:
        """Of its parts."""
        return c.address_of(self.parts)


class _Cannot(Exception):
    """Some part is more than C knows."""


@torch.no_grad()
def compiled(plan: Plan, layers: Mapping[str, AdaptedLayer], name: str) -> CompiledAdapter | None:
    """The adapter `name` of a base with a plan; None where it has a part that only the modules can run. `layers`: all
    that are adapted."""
    found = CompiledAdapter((c.Part * plan.count)())
    try:
        for layer in layers.values():
            if (part := layer.part(name)) is not None:
                _place(plan, layer, part, found)
    except _Cannot:
        return None
    return found


def _place(plan: Plan, layer: AdaptedLayer, part: AdapterModule, found: CompiledAdapter) -> None:
    place, module = plan.places.get(layer.base_layer), layer.base_layer
    if place is None:
        if not isinstance(part, EmbeddingLora | ModuleCopy | TrainedTokens | VirtualTokens):
            raise _Cannot
        found.embeds_by_row |= isinstance(part, EmbeddingLora)  # its product is torch's
        return
    into, kept = found.parts[place], found.kept
    is_norm = not isinstance(getattr(module, "in_features", None), int)
    if isinstance(part, HeadRows):
        found.after_head = _head_rows(part, module, plan.dtype)
    elif isinstance(part, ModuleCopy | TiedHead):
        weight = part.module.get_parameter("weight") if isinstance(part, ModuleCopy) else None
        if isinstance(part, TiedHead):
            weight = part.embedding[0].module.get_parameter("weight")
        bias = part.bias if isinstance(part, TiedHead) else getattr(part.module, "bias", None)
        assert weight is not None
        in_type = weight.detach().to(plan.dtype)
        into.weight = kept.fp32(in_type) if is_norm else kept.at(in_type.contiguous())
        into.bias = kept.fp32(None if bias is None else bias.detach().to(plan.dtype))
    else:
        _fuse(plan, layer, part, into, found)


def _fuse(plan: Plan, layer: AdaptedLayer, part: AdapterModule, into: c.Part, found: CompiledAdapter) -> None:
    if part.training and part.dropout:
        raise RuntimeError(
            "an adapter with lora_dropout is in training, and generation draws nothing; switch dropout off: "
            "adapters.train(name, False)"
        )
    kept, fused = found.kept, part.fused_terms(0, 1, layer.base_layer)
    if fused is None or max(map(len, (fused.terms, fused.gains, fused.shifts, fused.input_gains))) > 1:
        raise _Cannot
    for term in fused.terms:
        into.a = kept.at(term.a.detach().to(plan.dtype).contiguous())
        into.b = kept.at(c.packed_ranks(term.b, plan.dtype))
        into.rank, into.alpha = len(term.a), term.scaling
        found.rank = max(found.rank, into.rank)
    for gain in fused.gains:
        into.gain, into.leaves_bias = kept.fp32(gain.factor), not gain.with_bias
    for shift in fused.shifts:
        into.shift = kept.fp32(shift.amount)
    for gain in fused.input_gains:
        if not _stands_alone(plan, layer.base_layer):
            raise _Cannot
        into.input_gain = kept.fp32(gain.factor)
        found.input_gains = True


def _stands_alone(plan: Plan, module: nn.Module) -> bool:
    """Whether no other layer is given the same input."""
    place = plan.places[module]
    groups = [
        plan.head,
        *(group for layer in plan.layers for group in (layer.qkv, layer.out, layer.gate_up, layer.down)),
    ]
    return any(group.place == place and len(group.weights) == 1 for group in groups)


def _head_rows(part: HeadRows, head: nn.Module, dtype: torch.dtype) -> AfterHead:
    rows, tokens = part.rows.distance(head).to(dtype).float(), part.rows.tokens

    def add(hidden: Tensor, logits: Tensor) -> None:
        for row, to in zip(hidden.float(), logits):
            to[tokens] += (rows * row).sum(-1)

    return add


def prefix_rows(tokens: Sequence[int], virtual: int) -> int:
    """How many of a chunk's tokens, from its first on, are VIRTUAL."""
    count = 0
    while count < len(tokens) and tokens[count] == virtual:
        count += 1
    return count
