"""What adapters compute of their weights alone, held while none of them changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Holding(Protocol):
    """A module that can keep what it computes of its own and the base's weights (`adapters/module.py`)."""

    def hold(self) -> None:
        """From the next time on keep it."""
        ...

    def release(self) -> None:
        """Compute it in every pass again."""
        ...


@contextmanager
def held_for_inference(model: nn.Module) -> Iterator[None]:
    """For whoever runs many passes, as generation does for every token: until the block ends each adapter's part
    computes once what depends on weights alone (DoRA's row lengths). No weight may change meanwhile; adapters that come
    or are loaded inside the block are safe."""
    held = [module for module in model.modules() if isinstance(module, Holding)]
    for module in held:
        module.hold()
    try:
        yield
    finally:
        for module in held:
            module.release()
