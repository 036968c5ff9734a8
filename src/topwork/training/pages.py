"""Where an optimizer's state lives between steps, and how it visits the device that computes.

A home gives out zeroed tensors (`reserve`) and lends slices of them, window by window, to whoever updates them
(`visit`). While one window is worked on, the next is on its way and the one before goes back.
"""

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from topwork.common.errors import RunError

Window = Sequence[Tensor]
"""Slices of reserved tensors that are lent together."""


class StateStore(Protocol):
    def reserve(self, shape: int, dtype: torch.dtype) -> Tensor:
        """Zeros [shape] that stay where they are for the home's life. Raises RunError where there is no room."""

    def visit(self, windows: Sequence[Window]) -> Iterator[list[Tensor]]:
        """Each window in turn, on the device; what is written into it before the next is asked for, is kept."""


class DeviceStore:
    """State that stays on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reserve(self, shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def visit(self, windows: Sequence[Window]) -> Iterator[list[Tensor]]:
        for window in windows:
            yield list(window)


class FileStore:
    """State in memory-mapped, unnamed files: nothing is left behind, however the process ends.

    What is not visited needs no memory of the process's own: the kernel keeps it as cached pages of the file, which it
    writes out when memory runs short. That holds on a disk; a folder in memory (tmpfs) saves nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._maps: list[tuple[int, mmap.mmap]] = []

    def reserve(self, shape: int, dtype: torch.dtype) -> Tensor:
        if shape == 0:
            return torch.zeros(0, dtype=dtype)
        size = shape * dtype.itemsize
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                if hasattr(os, "posix_fallocate"):  # else a disk that fills up later kills whoever writes a page
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise RunError(self._no_room(size, error)) from error
        tensor = torch.frombuffer(mapped, dtype=dtype)
        self._maps.append((tensor.data_ptr(), mapped))
        return tensor

    def visit(self, windows: Sequence[Window]) -> Iterator[list[Tensor]]:
        for index, window in enumerate(windows):
            for part in windows[index + 1] if index + 1 < len(windows) else ():
                self._advise(part, mmap.MADV_WILLNEED)
            yield list(window)
            for part in window if len(windows) > 2 else ():  # two are held anyway; coming back costs a fault a page
                self._advise(part, mmap.MADV_DONTNEED)  # of a shared file: what was written stays in the file

    def _advise(self, part: Tensor, advice: int) -> None:
        at = part.data_ptr()
        base, mapped = next((base, mapped) for base, mapped in self._maps if 0 <= at - base < len(mapped))
        first = (at - base) // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(advice, first, at - base + part.nbytes - first)

    def _no_room(self, size: int, error: OSError) -> str:
        free = f", {shutil.disk_usage(self._folder).free / 2**20:.1f} MiB are free" if self._folder.is_dir() else ""
        return (
            f"the paged optimizer's state needs {size / 2**20:.1f} MiB more in a file in {self._folder}, which cannot "
            f"be reserved ({error.strerror}{free}); free some space, set output_dir to another disk, or take "
            "training.optim: adamw_8bit, which keeps its state in memory"
        )


class PinnedStore:
    """State in page-locked host memory. Two windows' worth of CUDA memory hold what is worked on and what comes next.

    Copies run on a stream of their own: window i + 1 comes and window i - 1 goes while window i is updated. Between
    visits the host's copy is whole.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._staging = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(2)]

    def reserve(self, shape: int, dtype: torch.dtype) -> Tensor:
        try:
            return torch.zeros(shape, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            raise RunError(
                f"the paged optimizer's state needs {shape * dtype.itemsize / 2**20:.1f} MiB more of page-locked host "
                f"memory, which is not to be had ({error}); raise the limit (ulimit -l) or take training.optim: "
                "adamw_8bit, which keeps its state on the device"
            ) from error

    def visit(self, windows: Sequence[Window]) -> Iterator[list[Tensor]]:
        current = torch.cuda.current_stream(self._device)
        self._make_room(windows)
        lent = [self._lent(window, self._staging[index % 2]) for index, window in enumerate(windows)]
        self._stream.wait_stream(current)
        arrived = [self._copy(lent[0], windows[0])] if windows else []
        for index, window in enumerate(windows):
            if index + 1 < len(windows):  # after the window before has left the same room: one stream, in order
                arrived.append(self._copy(lent[index + 1], windows[index + 1]))
            current.wait_event(arrived[index])
            yield lent[index]
            self._stream.wait_stream(current)
            self._copy(window, lent[index])
        self._stream.synchronize()

    def _make_room(self, windows: Sequence[Window]) -> None:
        size = max((sum(_aligned(part.nbytes) for part in window) for window in windows), default=0)
        if self._staging[0].numel() < size:
            self._staging = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(2)]

    @staticmethod
    def _lent(window: Window, room: Tensor) -> list[Tensor]:
        parts, at = [], 0
        for part in window:
            parts.append(room[at : at + part.nbytes].view(part.dtype))
            at += _aligned(part.nbytes)
        return parts

    def _copy(self, targets: Window, sources: Window) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources):
                target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        return done


def _aligned(size: int) -> int:
    return -(-size // 256) * 256
