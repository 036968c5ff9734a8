"""What a run tells the person who waits for it."""

from typing import Any, Protocol

from topwork.common.streams import sure


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


class Sure:
    """Tells another, whose stream may break: that never ends a run."""

    def __init__(self, told: Progress) -> None:
        self.started, self.stepped, self.validated = sure(told.started), sure(told.stepped), sure(told.validated)
        self.note, self.ended, self.finished = sure(told.note), sure(told.ended), sure(told.finished)


class Silent:
    """Tells nothing."""

    def started(self, step: int, steps: int) -> None: ...

    def stepped(self, step: int, record: dict[str, Any]) -> None: ...

    def validated(self, step: int, record: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def ended(self, how: str) -> None: ...

    def finished(self) -> None: ...
