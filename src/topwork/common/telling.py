"""What is being done, told to whoever waits for it."""

from collections.abc import Callable


def doing(log: Callable[[str], None], text: str) -> None:
    """Say what the next seconds are for: a status that goes away again where `log` shows one (`run/console.py`), a line
    elsewhere."""
    status = getattr(log, "doing", None)
    if status is None:
        log(f"{text} ...")
    else:
        status(text)
