"""The card that a part runs on, and on a CPU what stands for it.

There nothing is measured: seconds are a wall clock's around kernels that are interpreted, and memory is always zero. It
shows that a part runs through, no more.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

TURNS = 5
SECONDS_A_TURN = 0.03
MOST_CALLS = 200


@dataclass(frozen=True)
class Card:
    """A device and its clocks."""

    device: torch.device

    @property
    def measured(self) -> bool:
        """Whether figures are a card's."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until all that was asked for is done."""
        if self.measured:
            torch.cuda.synchronize(self.device)

    def timed(self, call: Callable[[], Any]) -> float:
        """Seconds of one call, from an idle device to an idle device."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def seconds(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Median seconds of a call, by the device's own clock. `calls` do the same on inputs of their own, in turns, so
        that none finds its inputs in the cache; all are called once before."""
        for call in calls:
            call()
        if not self.measured:
            return median(map(self.timed, calls))
        once = self.timed(lambda: [call() for call in calls]) / len(calls)
        count = max(len(calls), min(MOST_CALLS, int(SECONDS_A_TURN / once)))
        found = []
        for _ in range(TURNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for number in range(count):
                calls[number % len(calls)]()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3 / count)
        return median(found)

    def allocated(self) -> int:
        """Bytes that tensors take now."""
        return torch.cuda.memory_allocated(self.device) if self.measured else 0

    def peak(self) -> int:
        """The most bytes that tensors took since `forget_peak`."""
        return torch.cuda.max_memory_allocated(self.device) if self.measured else 0

    def peak_reserved(self) -> int:
        """The most bytes that torch took from the card since `forget_peak`."""
        return torch.cuda.max_memory_reserved(self.device) if self.measured else 0

    def forget_peak(self) -> None:
        """Peaks are counted from here on."""
        if self.measured:
            torch.cuda.reset_peak_memory_stats(self.device)

    def free(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.measured:
            torch.cuda.empty_cache()

    def cache_bytes(self) -> int:
        """Of its last level of cache."""
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size) if self.measured else 0
