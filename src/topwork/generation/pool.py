"""Where the keys and values of all sequences lie: for each layer a pool of blocks, and how many there are."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from topwork.common.memory import free_memory_bytes
from topwork.models.base import Base
from topwork.ops.attention_reference import AttentionRule
from topwork.ops.batch import batch_of
from topwork.ops.context import PassContext
from topwork.ops.paged import BLOCK, block_pool

SHARE_OF_FREE_MEMORY = 0.25


class KeyValuePool:
    """`blocks` blocks of BLOCK tokens in every layer, whatever its heads are. A layer's memory is asked for when it is
    first written, and on a CPU taken block by block as they are written."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._layers: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def of(
        self, layer: Hashable, heads: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer (`layer_key`), as `ops/paged.py` lays them out. Raises ValueError where it was
        asked for with other heads before."""
        if layer not in self._layers:
            self._layers[layer] = block_pool(self.blocks, heads, size, dtype, device)
        values = self._layers[layer][1]
        found = values.shape[1], values.shape[3], values.dtype, values.device
        if found != (heads, size, dtype, device):
            raise ValueError(f"layer {layer} keeps {found} (heads, size, type, device), asked for were {heads, size}")
        return self._layers[layer]

    def clear(self) -> None:
        """Give all memory back; what it held is lost."""
        self._layers.clear()


def layer_key(attention: nn.Module) -> Hashable:
    """What a layer's pool is known by: its number, as transformers gives each attention."""
    number: int | None = getattr(attention, "layer_idx", None)
    return attention if number is None else number


def pool_blocks(base: Base, sequences: int, tokens: int | None = None) -> int:
    """How many blocks a pool has: room for so many `tokens`, or, left out, for as many as `sequences` whole contexts
    need, of which no more than a quarter of the free memory is taken, and at least one whole context."""
    if tokens is not None:
        return max(1, tokens // BLOCK)
    context = -(-base.context_length // BLOCK)
    budget = int(SHARE_OF_FREE_MEMORY * free_memory_bytes(base.device)) // (BLOCK * token_bytes(base))
    return max(context, min(sequences * context, budget))


@torch.no_grad()
def token_bytes(base: Base) -> int:
    """What the keys and values of a token take, in all layers: seen in a pass over one."""
    seen = _Seen()
    batch = batch_of([torch.zeros(1, dtype=torch.int64)]).to(base.device)
    base.run(PassContext(batch, cache=seen))
    return seen.bytes


@dataclass
class _Seen:
    """In a cache's place: what would be kept of a token."""

    bytes: int = 0

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, sinks: Tensor | None  # noqa: ARG002
    ) -> Tensor:  # fmt: skip
        self.bytes += k.nbytes + v.nbytes
        return torch.zeros_like(q)
