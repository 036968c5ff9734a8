"""Ctrl-C and SIGTERM ask a run to end after the step under way; a second Ctrl-C ends it at once."""

import os
import signal
import threading
from types import FrameType


class Interrupts:
    """While entered, remembers that the user asked to stop instead of breaking off in the middle of an update."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, signal.Handlers] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # print is not safe inside a signal handler
        os.write(2, b"\nstopping after this step, with a checkpoint; once more to stop at once\n")
