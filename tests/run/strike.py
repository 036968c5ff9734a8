"""Inside a command's own process: sends it a signal in the midst of a phase of its work, and notes where it was."""

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

PHASES = {
    "loading": "topwork.run.train:_prepared",
    "training": "topwork.training.loop:train_step",
    "validation": "topwork.training.loop:mean_losses",
    "saving": "topwork.training.trial:save_checkpoint",
    "ending": "topwork.run.training:_finished",
    "asking": "topwork.run.evaluate:_score_arms",
    "writing scores": "topwork.run.evaluate:keep_scores",
}
"""Name -> the function that is the phase."""
OVER = "over"
"""What follows the command's work, when signals do again what the system has them do."""


def arm(events: str, phase: str | None = None, number: int = 0, nth: int = 1, delay_seconds: float = 0.0) -> None:
    """Write beginnings and ends of phases to the file `events`, and send `number` so long after `phase` has begun for
    the nth time."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started all this may have ignored it
    sys.setswitchinterval(1e-4)  # the thread that strikes is not to wait for a long line of Python
    log = os.open(events, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    def say(what: str, name: str) -> None:
        os.write(log, f"{what}\t{name}\t{time.monotonic()}\n".encode())

    def strike() -> None:
        time.sleep(delay_seconds)
        say("strike", str(phase))
        os.kill(os.getpid(), number)

    for name, place in PHASES.items():
        module, _, function = place.partition(":")
        found = importlib.import_module(module)
        setattr(found, function, _told(getattr(found, function), name, say, strike, nth if name == phase else 0))
    _tell_the_end(lambda: say("begin", OVER))


def _tell_the_end(say_over: Callable[[], None]) -> None:
    app = importlib.import_module("topwork.cli.app")
    inner = app.ending_on_signals

    @contextmanager
    def ending() -> Iterator[None]:
        with inner():
            try:
                yield
            finally:
                say_over()

    vars(app)[inner.__name__] = ending


def _told(inner: Callable[..., Any], name: str, say: Callable[[str, str], None], strike: Callable[[], None], nth: int
          ) -> Callable[..., Any]:  # fmt: skip
    times = 0

    @wraps(inner)
    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal times
        times += 1
        say("begin", name)
        if times == nth:
            threading.Thread(target=strike, daemon=True).start()
        try:
            return inner(*arguments, **named)
        finally:
            say("end", name)

    return call


def struck(events: Path) -> str | None:
    """The phase in which the signal came, OVER for after all, "between" for none of them; None where it never came."""
    inside = "between"
    for what, name, _ in _lines(events):
        if what == "strike":
            return inside
        inside = name if what == "begin" else "between"
    return None


def usual_seconds(events: Path) -> dict[str, float]:
    """How long each phase took, by the median."""
    found: dict[str, list[float]] = {}
    begun = 0.0
    for what, name, moment in _lines(events):
        if what == "begin":
            begun = moment
        else:
            found.setdefault(name, []).append(moment - begun)
    return {name: median(seconds) for name, seconds in found.items()}


def _lines(events: Path) -> list[tuple[str, str, float]]:
    if not events.exists():
        return []
    parts = (line.split("\t") for line in events.read_text().splitlines())
    return [(what, name, float(moment)) for what, name, moment in parts]
