"""How far a large model is written, told while it is."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from topwork.models.lazy import LazyModel, LazyTensor
from topwork.run.console import Counter

WORTH_TELLING = 1 << 30
"""Bytes; what is smaller is written in a few seconds."""


def counted(model: LazyModel, counter: Counter) -> LazyModel:
    """A model whose tensors tell a counter when they are first asked for."""
    seen: set[str] = set()

    def told(key: str, get: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def fetch() -> Tensor:
            found = get()
            if key not in seen:
                seen.add(key)
                counter(1)
            return found

        return fetch

    def one(key: str, tensor: LazyTensor) -> LazyTensor:
        view = told(key, tensor.view) if tensor.view is not None else None
        return replace(tensor, fetch=told(key, tensor.fetch), view=view)

    return replace(model, tensors={key: one(key, tensor) for key, tensor in model.tensors.items()})


def telling(what: str, model: LazyModel, log: Callable[[str], None], write: Callable[[LazyModel], object]) -> None:
    """Have `write` write a model, and tell how far it is where that takes minutes."""
    if model.nbytes < WORTH_TELLING:
        write(model)
        return
    with Counter(what, len(model.tensors), log) as counter:
        write(counted(model, counter))
