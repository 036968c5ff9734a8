"""Memory for what a training pass keeps until it has gone backward, which the next pass takes again.

What is kept is allocated among what is needed for a moment, and small things then settle in the holes that this leaves:
a C heap grows by a layer's buffers with every layer, and again with every pass of another length (docs/log.md). So on
CPUs kept tensors stand one behind another in one block, and every pass begins at its start. What is needed for a moment
has blocks of its own. CUDA's caching allocator needs no such help.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; torch's own."""
LEAST_BLOCK = 1 << 26
"""Bytes. The C library gives blocks of this size back to the system as soon as they are free."""


class PassMemory:
    """Blocks that grow to what the largest pass needs.

    kept     overwritten in the next pass
    brief    a function's own; overwritten once it has ended
    passing  handed to the next function; overwritten by the next that is handed on
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._brief: list[Tensor] = []
        self._passing: list[Tensor] = []
        self._kept_end = self._brief_end = self._functions = 0

    @contextmanager
    def next_pass(self) -> Iterator[None]:
        """A pass, forward and backward, when nothing of the one before is needed any more."""
        assert _ACTIVE.get() is None, "a pass inside another would overwrite what that one kept"
        if len(self._kept) > 1:  # the last pass was larger than those before
            size = sum(map(len, self._kept))
            self._kept.clear()
            self._kept.append(_block(size))
        self._kept_end = 0
        with _active(self):
            yield

    def release(self) -> None:
        """Give the memory back."""
        for blocks in (self._kept, self._brief, self._passing):
            blocks.clear()
        self._kept_end = 0

    def kept(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor that lasts as long as the pass."""
        size = _bytes(shape, dtype)
        if not self._kept or self._kept_end + size > len(self._kept[-1]):
            self._kept.append(_block(size))
            self._kept_end = 0
        start, self._kept_end = self._kept_end, self._kept_end + size
        return _tensor(self._kept[-1], start, shape, dtype)

    @contextmanager
    def function(self) -> Iterator[None]:
        """What is brief in here is free again at the end."""
        before = self._brief_end
        self._functions += 1
        try:
            yield
        finally:
            self._functions -= 1
            self._brief_end = before

    def brief(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A contiguous tensor that lasts as long as the `function` does; None outside of any."""
        if not self._functions:
            return None
        size = _bytes(shape, dtype)
        start, self._brief_end = self._brief_end, self._brief_end + size
        return _tensor(_grown(self._brief, self._brief_end), start, shape, dtype)

    def passing(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor that lasts until the next one is asked for."""
        return _tensor(_grown(self._passing, _bytes(shape, dtype)), 0, shape, dtype)


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


_ACTIVE: ContextVar[PassMemory | None] = ContextVar("topwork_pass_memory", default=None)


@contextmanager
def _active(memory: PassMemory | None) -> Iterator[None]:
    token = _ACTIVE.set(memory)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextmanager
def outside_of_pass_memory() -> Iterator[None]:
    """For what keeps nothing, or is computed again going backward and does not keep it for long."""
    with _active(None):
        yield


@contextmanager
def function_memory() -> Iterator[None]:
    """Around what `brief_empty` is for, in a function that returns none of it."""
    memory = _ACTIVE.get()
    if memory is None:
        yield
    else:
        with memory.function():
            yield


def in_a_pass(like: Tensor) -> bool:
    """Whether tensors of this device come from a pass's memory."""
    return _memory_for(like) is not None


def kept_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Like `like.new_empty(shape)`, for a tensor that is kept until the pass has gone backward."""
    memory = _memory_for(like)
    return memory.kept(shape, dtype or like.dtype) if memory else like.new_empty(shape, dtype=dtype or like.dtype)


def brief_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Like `like.new_empty(shape)`; within `function_memory` it is gone when that ends."""
    memory = _memory_for(like)
    found = memory.brief(shape, dtype or like.dtype) if memory else None
    return like.new_empty(shape, dtype=dtype or like.dtype) if found is None else found


def passing_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Like `like.new_empty(shape)`, for what is used up before this is called again."""
    memory = _memory_for(like)
    return memory.passing(shape, dtype or like.dtype) if memory else like.new_empty(shape, dtype=dtype or like.dtype)


def _memory_for(like: Tensor) -> PassMemory | None:
    return _ACTIVE.get() if like.is_cpu else None
