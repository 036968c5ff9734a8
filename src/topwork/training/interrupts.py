"""What asks a run to stop: Ctrl-C, SIGTERM, the terminal that goes (SIGHUP), a scheduler (SIGUSR1, SIGXCPU).

Inside `Interrupts` the first of them is remembered, and the run ends where it can go on from. Inside
`ending_on_signals`, which is the rest of a command, it ends the command as Ctrl-C does: by an exception, so that what
is being written is taken back.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], None]
_NAMES = ("SIGINT", "SIGBREAK", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""Those of them that this system has."""

_BY_HAND = tuple(number for number in SIGNALS if number.name in ("SIGINT", "SIGBREAK"))
_AT_ONCE = tuple(number for number in SIGNALS if number.name in ("SIGINT", "SIGBREAK", "SIGTERM"))
"""Which of them, given again, end a run at once. The others come again by themselves: a terminal that goes hangs up
twice, and SIGXCPU is sent every second."""

_ECHO_SECONDS, _BY_HAND_ECHO_SECONDS = 1.0, 0.05
"""`timeout` and schedulers send a signal to a process and to its group: one so soon after the first is the same. Nobody
presses Ctrl-C twice in the shorter time, in which `timeout -s INT` sends it twice."""


class Stopped(SystemExit):
    """A signal that ended a command; its code is the shell's, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class Interrupts:
    """While entered, remembers that the user asked to stop instead of breaking off in the middle of an update; once
    more, and the signal does what it did before (KeyboardInterrupt, where that was nothing of Python's).

    A signal that is ignored (under `nohup`) stays so, as does a handler of the program's own on any but Ctrl-C and
    SIGTERM. In a thread other than the main one, which gets no signals, nothing is remembered.
    """

    def __init__(self) -> None:
        self.asked = False
        self.number: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        self._before = _installed(self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        _restored(self._before)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked:
            echo = _BY_HAND_ECHO_SECONDS if number in _BY_HAND else _ECHO_SECONDS
            if number in _AT_ONCE and (now - self._since > echo or (number in _BY_HAND and number != self.number)):
                self._break_off(number, frame)
            return
        self.asked, self.number, self._since = True, number, now
        with suppress(OSError):  # a terminal that has gone takes no words; print is not safe in a handler
            os.write(2, b"\nstopping, with a checkpoint; once more to stop at once\n")

    def _break_off(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number)
        if callable(before):
            before(number, frame)
        else:
            raise KeyboardInterrupt


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Until the block ends, each of the signals raises `Stopped`, which no `except Exception` keeps."""
    before = _installed(_end)
    try:
        yield
    finally:
        _restored(before)


def _end(number: int, _frame: FrameType | None) -> None:
    raise Stopped(number)


def _installed(handler: Handler) -> dict[int, Any]:
    """What each signal did before, of those that now go to `handler`."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in SIGNALS if _is_free(number)}


def _is_free(number: int) -> bool:
    """Whether a signal may be taken."""
    now = signal.getsignal(number)
    if now is signal.SIG_IGN or now is None:  # None: set by other than Python, and could not be put back
        return False
    return number in _AT_ONCE or now in (signal.SIG_DFL, _end)


def _restored(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
