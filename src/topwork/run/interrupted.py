"""How a run that was asked to stop tells its caller."""

import signal
from typing import Any


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C or another signal (`training/interrupts.py`) stopped a call, with checkpoints of the last steps.

    It is no `Exception`, so that a program which goes on after errors does not go on with its next run. `done` is what
    the call would have given, with "stopped": "interrupted" in the results that are not at their end, and `number` the
    signal's.
    """

    def __init__(self, done: Any, number: int | None, told: str) -> None:
        name = "the caller" if number is None else signal.Signals(number).name
        super().__init__(f"{told} by {name}; what was trained is kept: call again with resume=True to go on")
        self.done, self.number, self._told = done, number, told

    def __reduce__(self) -> tuple[Any, ...]:
        return RunInterrupted, (self.done, self.number, self._told)  # as it leaves a process of a pool
