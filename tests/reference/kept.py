"""What a forward pass keeps for its backward pass, counted by autograd's own hooks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor

from topwork.models.base import Base
from topwork.ops.batch import Batch


def kept_by(run: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """Bytes of all storages that autograd holds for what `run` returns, each counted once; neither that nor `own`."""
    without = {tensor.untyped_storage().data_ptr() for tensor in own}
    held: WeakSet[_Held] = WeakSet()

    def pack(tensor: Tensor) -> _Held:
        found = _Held(tensor)
        held.add(found)
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda found: found.tensor):
        out = run()
    storages = [found.tensor.untyped_storage() for found in held]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(sizes[at] for at in sizes.keys() - without - {out.untyped_storage().data_ptr()})


@dataclass(frozen=True, eq=False)
class _Held:
    """What autograd holds a tensor by: as long as the result needs it."""

    tensor: Tensor


def kept_bytes(base: Base, batch: Batch) -> int:
    """The same for a pass over `batch` (hidden states alone, no head), the model's own weights not counted."""
    return kept_by(lambda: base.hidden(batch), (*base.module.parameters(), *base.module.buffers()))


def kept_bytes_per_token(base: Base, short: Batch, long: Batch) -> float:
    """The same by tokens, without what does not grow with them (casts of the adapter's weights)."""
    return (kept_bytes(base, long) - kept_bytes(base, short)) / (len(long.tokens) - len(short.tokens))
