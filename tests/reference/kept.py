"""What a forward pass keeps for its backward pass, counted by autograd's own hooks."""

import torch
from torch import Tensor

from topwork.models.base import Base
from topwork.ops.stream import Stream


def kept_bytes(base: Base, stream: Stream) -> int:
    """Bytes of all storages that autograd holds after a pass over `stream` (hidden states alone, no head), each counted
    once and the model's own weights not at all."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*base.module.parameters(), *base.module.buffers())}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = base.hidden(stream)
    sizes.pop(hidden.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def kept_bytes_per_token(base: Base, short: Stream, long: Stream) -> float:
    """The same by tokens, without what does not grow with them (casts of the adapter's weights)."""
    return (kept_bytes(base, long) - kept_bytes(base, short)) / (len(long.tokens) - len(short.tokens))
