"""Memory for what a training pass keeps until it has gone backward, which the next pass takes again.

What is kept is allocated among what is needed for a moment, and small things then settle in the holes that this leaves:
a C heap grows by a layer's buffers with every layer, and again with every pass of another length (docs/log.md). So on
CPUs kept tensors stand one behind another in blocks, and every pass begins at their start. A longer pass adds blocks
and leaves those that there are, whose pages the system has handed out already: new ones take it a while (150 ms for
those of a step of SmolLM2-135M). What is needed for a moment has blocks of its own. CUDA's caching allocator needs no
such help.
"""

import math
from types import TracebackType

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes; torch's own."""
LEAST_BLOCK = 1 << 27
"""Bytes. The C library gives blocks of this size back to the system as soon as they are free. What nobody wrote to
costs nothing."""
MOST_UNUSED = 1 / 8
"""Of what a pass keeps, what it may leave free at its blocks' ends when it makes new ones: else they are joined."""


class Workspace:
    """Blocks that grow to what the largest pass needs.

    saved     for the backward pass; overwritten in the next pass
    scratch   a function's own; overwritten once it has ended
    handoff   handed to the next function; overwritten by the next that is handed on
    handback  what a layer's branch begins with, or the gradient by that on its way back, beside what is handed on;
              overwritten by the next such one
    """

    def __init__(self) -> None:
        self._saved: list[Tensor] = []
        self._scratch: list[Tensor] = []
        self._handoff: list[Tensor] = []
        self._handback: list[Tensor] = []
        self._made: dict[tuple[int, int, tuple[int, ...], torch.dtype], Tensor] = {}
        self._scratch_end = self._scopes = 0
        self._rewind()

    def begin_pass(self) -> None:
        """Take everything again for a pass, forward and backward: nothing of the one before is needed any more."""
        if self._grew and self._unused > MOST_UNUSED * self._kept:
            size = self._kept
            self._saved.clear()
            self._saved.append(_block(size))
        self._rewind()

    def release(self) -> None:
        """Give the memory back."""
        for blocks in (self._saved, self._scratch, self._handoff, self._handback):
            blocks.clear()
        self._rewind()

    def _rewind(self) -> None:
        self._saved_at = self._saved_end = self._kept = self._unused = 0
        self._grew = False
        self._made.clear()

    def saved(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor that lasts as long as the pass."""
        size = _bytes(shape, dtype)
        while self._saved_at < len(self._saved) and self._saved_end + size > self._saved[self._saved_at].numel():
            self._unused += self._saved[self._saved_at].numel() - self._saved_end
            self._saved_at, self._saved_end = self._saved_at + 1, 0
        if self._saved_at == len(self._saved):
            self._saved.append(_block(size))
            self._grew = True
        start, self._saved_end = self._saved_end, self._saved_end + size
        self._kept += size
        return _tensor(self._saved[self._saved_at], start, shape, dtype)

    def scope(self) -> "Scope":
        """The scratch of a function is free again at its end."""
        return Scope(self)

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A contiguous tensor that lasts as long as the `scope` does; None outside of any."""
        if not self._scopes:
            return None
        size = _bytes(shape, dtype)
        start, self._scratch_end = self._scratch_end, self._scratch_end + size
        return self._tensor(self._scratch, start, self._scratch_end, shape, dtype)

    def handoff(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor that lasts until the next one is asked for."""
        return self._tensor(self._handoff, 0, _bytes(shape, dtype), shape, dtype)

    def handback(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor that lasts until the next one is asked for here, whatever is handed on meanwhile."""
        return self._tensor(self._handback, 0, _bytes(shape, dtype), shape, dtype)

    def _tensor(
        self, blocks: list[Tensor], start: int, stop: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        """In the one block, which is made at least `stop` bytes long. (Tensors in a smaller one hold that as long as
        they live.) Layer after layer asks for the same, which is made once a pass; `data` is another tensor of that
        memory, and writes to it are counted apart."""
        if not blocks or blocks[0].numel() < stop:
            blocks[:] = [_block(stop)]
            self._made.clear()
        key = (blocks[0].data_ptr(), start, shape, dtype)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = _tensor(blocks[0], start, shape, dtype)
        return found.data


class Scope:
    """What is taken of a workspace's scratch within it is free again at its end."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace, self._end = workspace, workspace._scratch_end

    def __enter__(self) -> None:
        self._workspace._scopes += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._workspace._scopes -= 1
        self._workspace._scratch_end = self._end


def _block(size: int) -> Tensor:
    return torch.empty(max(size, LEAST_BLOCK), dtype=torch.uint8)


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _tensor(block: Tensor, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Not a view: autograd counts the writes to each tensor of its own."""
    return torch.empty(0, dtype=dtype).set_(block.untyped_storage(), start // dtype.itemsize, shape)  # type: ignore[call-overload]
