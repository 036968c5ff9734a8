"""Torch's threads, and with them the C kernels', as many as pay for as long as something computes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from topwork.common.processors import paying_threads
from topwork.common.threads import ThreadChoice, counted

Asked = Literal["auto"] | int
"""So many threads, or as many as pay: at most those that torch has, see `common/threads.py`."""


@dataclass(frozen=True)
class Threads:
    """Threads of a piece of work that has boundaries: `look` is called there, by the thread that computes.

    Torch's products may differ in their last bits between numbers of threads (`ops/native` never does), so none changes
    anywhere else.
    """

    choice: ThreadChoice | None = None

    @property
    def count(self) -> int:
        """How many there are now."""
        return torch.get_num_threads() if self.choice is None else self.choice.count

    def look(self) -> str | None:
        """As many threads as pay now; what has changed, in words, or None. Held, it changes nothing."""
        told = None if self.choice is None else self.choice.look()
        if told is not None:
            _take(self.count)
        return told


def take_first_cosines() -> None:
    """Nobody's cosines: the first that a thread of MKL's takes are now and then off by 1.5e-4 (torch 2.13 in 5 of 40
    processes, on an Intel Xeon; sines never), and rotary positions would have them."""
    torch.zeros(1 << 16).cos_()


def _take(threads: int) -> None:
    torch.set_num_threads(threads)
    take_first_cosines()


@contextmanager
def computing_threads(
    asked: Asked, tell: Callable[[str], None] = lambda _: None, choice: Callable[[int], ThreadChoice] = ThreadChoice
) -> Iterator[Threads]:
    """Torch with so many threads, and afterwards with those that it had. `tell` hears of fewer than it had from the
    start; `choice` is made of the most that pay."""
    before = torch.get_num_threads()
    most = paying_threads(before) if asked == "auto" else asked
    try:
        if most != before:
            _take(most)
        if asked == "auto" and most < before:
            tell(f"{counted(most)} instead of {before}: the cores that this process may use are no more")
        threads = Threads(choice(most) if asked == "auto" and most > 1 else None)
        if threads.count != torch.get_num_threads():  # the choice was made before
            _take(threads.count)
        yield threads
    finally:
        if torch.get_num_threads() != before:
            _take(before)


class RecurringThreads:
    """As many threads as pay for what computes now and then on a device: what was seen of the load stays known."""

    def __init__(self, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"
        self._held, self._threads = ExitStack(), Threads()
        self._choice: ThreadChoice | None = None

    def begin(self) -> None:
        """Something computes from here to `end`. On a GPU nothing is chosen."""
        if self._on_cpu:
            self._threads = self._held.enter_context(computing_threads("auto", choice=self._chosen))

    def look(self) -> None:
        """As many threads as pay now; at a boundary of what computes."""
        self._threads.look()

    def end(self) -> None:
        """Torch's threads as they were."""
        self._held.close()
        self._threads = Threads()

    def _chosen(self, most: int) -> ThreadChoice:
        if self._choice is None or self._choice.most != most:
            self._choice = ThreadChoice(most)
        return self._choice
