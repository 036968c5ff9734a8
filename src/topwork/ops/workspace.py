"""Memory for what a training pass keeps until it has gone backward, which the next pass takes again.

What is kept is allocated among what is needed for a moment, and small things then settle in the holes that this leaves:
a C heap grows by a layer's buffers with every layer, and again with every pass of another length (docs/log.md). So on
CPUs kept tensors stand one behind another in one block, and every pass begins at its start. What is needed for a moment
has blocks of its own. CUDA's caching allocator needs no such help.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; torch's own."""
LEAST_BLOCK = 1 << 26
"""Bytes. The C library gives blocks of this size back to the system as soon as they are free."""


class Workspace:
    """Blocks that grow to what the largest pass needs.

    saved     for the backward pass; overwritten in the next pass
    scratch   a function's own; overwritten once it has ended
    handoff   handed to the next function; overwritten by the next that is handed on
    handback  a gradient of a layer's branch on its way back, beside what is handed on; overwritten by the next such one
    """

    def __init__(self) -> None:
        self._saved: list[Tensor] = []
        self._scratch: list[Tensor] = []
        self._handoff: list[Tensor] = []
        self._handback: list[Tensor] = []
        self._saved_end = self._scratch_end = self._scopes = 0

    def begin_pass(self) -> None:
        """Take everything again for a pass, forward and backward: nothing of the one before is needed any more."""
        if len(self._saved) > 1:  # the last pass was larger than those before
            size = sum(map(len, self._saved))
            self._saved.clear()
            self._saved.append(_block(size))
        self._saved_end = 0

    def release(self) -> None:
        """Give the memory back."""
        for blocks in (self._saved, self._scratch, self._handoff, self._handback):
            blocks.clear()
        self._saved_end = 0

    def saved(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor that lasts as long as the pass."""
        size = _bytes(shape, dtype)
        if not self._saved or self._saved_end + size > len(self._saved[-1]):
            self._saved.append(_block(size))
            self._saved_end = 0
        start, self._saved_end = self._saved_end, self._saved_end + size
        return _tensor(self._saved[-1], start, shape, dtype)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """The scratch of a function is free again at its end."""
        before = self._scratch_end
        self._scopes += 1
        try:
            yield
        finally:
            self._scopes -= 1
            self._scratch_end = before

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A contiguous tensor that lasts as long as the `scope` does; None outside of any."""
        if not self._scopes:
            return None
        size = _bytes(shape, dtype)
        start, self._scratch_end = self._scratch_end, self._scratch_end + size
        return _tensor(_grown(self._scratch, self._scratch_end), start, shape, dtype)

    def handoff(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor that lasts until the next one is asked for."""
        return _tensor(_grown(self._handoff, _bytes(shape, dtype)), 0, shape, dtype)

    def handback(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor that lasts until the next one is asked for here, whatever is handed on meanwhile."""
        return _tensor(_grown(self._handback, _bytes(shape, dtype)), 0, shape, dtype)


def _grown(blocks: list[Tensor], size: int) -> Tensor:
    """The one block, at least so large. (Tensors in a smaller one hold that as long as they live.)"""
    if not blocks or len(blocks[0]) < size:
        blocks[:] = [_block(size)]
    return blocks[0]


def _block(size: int) -> Tensor:
    return torch.empty(max(size, LEAST_BLOCK), dtype=torch.uint8)


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _tensor(block: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Not a view: autograd counts the writes to each tensor of its own."""
    return torch.empty(0, dtype=dtype).set_(block.untyped_storage(), start // dtype.itemsize, shape)  # type: ignore[call-overload]
