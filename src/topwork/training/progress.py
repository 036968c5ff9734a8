"""What a run tells the person who waits for it."""

from collections.abc import Callable
from typing import Any, Protocol


class Progress(Protocol):
    """Receives a run's figures as they come; metrics.jsonl has the same records."""

    def started(self, step: int, steps: int) -> None:
        """Training begins (or goes on) at `step` of `steps`."""

    def stepped(self, step: int, record: dict[str, Any]) -> None:
        """An optimizer step is done."""

    def validated(self, step: int, record: dict[str, Any]) -> None:
        """A validation is done."""

    def note(self, text: str) -> None:
        """Something a person should know."""

    def ended(self, how: str) -> None:
        """The adapter's training is over: finished, early stopping or diverged."""

    def finished(self) -> None:
        """No more will come."""


class Silent:
    """Tells nothing."""

    def started(self, step: int, steps: int) -> None: ...

    def stepped(self, step: int, record: dict[str, Any]) -> None: ...

    def validated(self, step: int, record: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def ended(self, how: str) -> None: ...

    def finished(self) -> None: ...


class Unbroken:
    """Tells it to another, until the other cannot write any more (a terminal that has gone, a pipe that is closed):
    then it falls silent, and training goes on."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner

    def started(self, step: int, steps: int) -> None:
        self._tell(lambda: self._inner.started(step, steps))

    def stepped(self, step: int, record: dict[str, Any]) -> None:
        self._tell(lambda: self._inner.stepped(step, record))

    def validated(self, step: int, record: dict[str, Any]) -> None:
        self._tell(lambda: self._inner.validated(step, record))

    def note(self, text: str) -> None:
        self._tell(lambda: self._inner.note(text))

    def ended(self, how: str) -> None:
        self._tell(lambda: self._inner.ended(how))

    def finished(self) -> None:
        self._tell(self._inner.finished)

    def _tell(self, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError:
            self._inner = Silent()
