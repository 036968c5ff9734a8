"""How many threads pay beside other work on the machine.

A parallel loop waits for its last thread. One that another process pushed off its core comes back after a slice of the
scheduler's, 3 to 4 ms, and a training step has some two thousand loops: beside one busy process on two cores two
threads took 3.6 times as long as when idle, one thread 1.9 (docs/log.md). So there are as many threads as other work
leaves cores. Whoever computes asks at the boundaries of what it does, and no more often than it likes: a look costs a
tenth of a millisecond at most, and only a few are taken each second. Free of torch.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from topwork.common.processors import Load, Usage, load_between, usage

SPINS = 50_000
"""How often a waiting thread of libgomp's looks before it sleeps. Its own 300,000 looks are 3.3 ms, a slice of the
scheduler's: all that time it keeps the core on which the pushed-off thread could go on."""
LOOK_SECONDS = 0.3
"""A load is measured over so long at least: counters go by hundredths of a second."""
DOWN = 0.6
"""Threads become fewer where other work takes so much more than the cores that they leave idle ..."""
UP = 0.75
"""... and more again once so much of another core has been free for a while."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 120.0
"""How long a core must have been free. Other work may show only as long as we are in its way (a host takes time from a
virtual machine that asks for it), so a trial that went wrong soon doubles the wait for the next."""
SOON_SECONDS = 60.0


def let_waiting_threads_sleep() -> None:
    """Have threads that wait for others sleep after half a millisecond. Heeded if it is called before torch is
    imported; what the environment says goes before."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def leaving(load: Load, threads: int, most: int) -> int:
    """How many threads a load leaves to a process that has `threads` now and may have `most`; the same number where it
    is neither clearly too many nor clearly too few.

    Half of `most` stay in any case: where other work would take every core, time is shared, and a process of few
    threads gets less of it.
    """
    least = max(1, most // 2)
    if load.free < threads - DOWN:
        return max(least, min(threads, int(load.free + 1 - DOWN)))
    if load.free >= threads + UP:
        return min(most, max(threads, int(load.free + 1 - UP)))
    return max(least, min(threads, most))


@dataclass
class ThreadChoice:
    """The number of threads by what the machine's load leaves, from `most` downwards; `look` at every boundary."""

    most: int
    read: Callable[[], Usage | None] = usage
    clock: Callable[[], float] = time.monotonic
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = self.most
        self._from = self.read() if self.most > 1 else None
        self._looked = self._free_since = self.clock()
        self._rose: float | None = None
        self._wait = FIRST_WAIT_SECONDS

    def look(self) -> str | None:
        """Choose anew, if it is time. What has changed, in words; None where nothing has."""
        now = self.clock()
        if self.most == 1 or now - self._looked < LOOK_SECONDS:
            return None
        before, self._from, self._looked = self._from, self.read(), now
        load = load_between(before, self._from) if before and self._from else None
        if load is None:
            return None
        wanted = leaving(load, self.count, self.most)
        if wanted <= self.count:
            self._free_since = now
        if wanted == self.count or (wanted > self.count and now - self._free_since < self._wait):
            return None
        return self._change(wanted, load, now)

    def _change(self, wanted: int, load: Load, now: float) -> str:
        before, self.count, self._free_since = self.count, wanted, now
        if wanted > before:
            self._rose = now
            return f"{_cores_free(wanted, self.most)}: {counted(wanted)} instead of {before}"
        if self._rose is not None:  # a trial is judged once: what it showed may take several looks to be seen whole
            in_vain, self._rose = now - self._rose < SOON_SECONDS, None
            self._wait = min(2 * self._wait, LONGEST_WAIT_SECONDS) if in_vain else FIRST_WAIT_SECONDS
        return f"{_busy(load)}: {counted(wanted)} instead of {before}"


def _busy(load: Load) -> str:
    if load.stolen > load.others / 2:
        return f"the host takes {_about(load.stolen)} of this machine's {load.cpus} processors away"
    if round(load.others) <= 1:
        return "another process keeps a core busy"
    return f"other processes keep {_about(load.others)} of {load.cpus} processors busy"


def _cores_free(count: int, most: int) -> str:
    return "the cores are free again" if count == most else "some of the cores are free again"


def _about(cpus: float) -> str:
    return f"{cpus:.0f}" if cpus >= 1.5 else f"{cpus:.1f}"


def counted(count: int) -> str:
    """So many threads, in words."""
    return "1 thread" if count == 1 else f"{count} threads"
