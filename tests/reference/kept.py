"""What a forward pass keeps for its backward pass, counted by autograd's own hooks."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from topwork.models.base import Base
from topwork.ops.batch import Batch


def kept_by(run: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """Bytes of all storages that autograd holds for what `run` returns, each counted once; neither that nor `own`."""
    without = {tensor.untyped_storage().data_ptr() for tensor in own}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in without:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    sizes.pop(out.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def kept_bytes(base: Base, batch: Batch) -> int:
    """The same for a pass over `batch` (hidden states alone, no head), the model's own weights not counted."""
    return kept_by(lambda: base.hidden(batch), (*base.module.parameters(), *base.module.buffers()))


def kept_bytes_per_token(base: Base, short: Batch, long: Batch) -> float:
    """The same by tokens, without what does not grow with them (casts of the adapter's weights)."""
    return (kept_bytes(base, long) - kept_bytes(base, short)) / (len(long.tokens) - len(short.tokens))
