"""Progress of adapters that train together: a live table of all on a terminal, plain lines where output is piped.

A progress is called with a member's name and gives that member's `Progress`, as `train_together` wants it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from topwork.run.console import Teller
from topwork.training.metrics import metrics_text
from topwork.training.progress import Progress

LINES_A_MEMBER = 10
"""Plain lines are about so many for each."""
STYLES = {"diverged": "red", "finished": "green", "early stopping": "green", "training": "cyan"}


@dataclass
class TrialLine:
    """What is known of a member."""

    name: str
    state: str = "waiting"
    step: int = 0
    steps: int = 0
    first: int = 0
    began: float = field(default_factory=time.perf_counter)
    loss: float | None = None
    eval_loss: float | None = None
    speed: float = 0.0
    metrics: str = ""

    def cells(self) -> list[str]:
        """For a table: name, step, loss, validation loss, the pass's tokens/s, time left, state."""
        losses = ["" if loss is None else f"{loss:.4f}" for loss in (self.loss, self.eval_loss)]
        running = self.state == "training"
        left, speed = (f"{self.left():,.0f} s", f"{self.speed:,.0f}") if running else ("", "")
        return [self.name, f"{self.step}/{self.steps}", *losses, speed, left, self.state]

    def left(self) -> float:
        """Seconds, at the pace so far."""
        spent = time.perf_counter() - self.began
        return spent / max(1, self.step - self.first) * (self.steps - self.step)


class _Told:
    """One member's Progress: keeps its row, and tells the whole that something has changed."""

    def __init__(self, row: TrialLine, changed: Callable[[TrialLine, str], None], note: Callable[[str], None]) -> None:
        self._row, self._changed, self._note = row, changed, note

    def started(self, step: int, steps: int) -> None:
        row = self._row
        row.step, row.steps, row.first, row.state, row.began = step, steps, step, "training", time.perf_counter()
        self._changed(row, "started")

    def stepped(self, step: int, record: dict[str, Any]) -> None:
        row = self._row
        row.step, row.loss, row.speed = step, record["loss"], record["tokens_per_second"]
        row.metrics = metrics_text(record)
        self._changed(row, "stepped")

    def validated(self, step: int, record: dict[str, Any]) -> None:
        self._row.step, self._row.eval_loss = step, record["loss"]
        self._changed(self._row, "validated")

    def note(self, text: str) -> None:
        self._note(f"{self._row.name}: {text}")

    def ended(self, how: str) -> None:
        self._row.state = how
        self._changed(self._row, "ended")

    def finished(self) -> None:
        if self._row.state == "training":
            self._row.state = "stopped"
        self._changed(self._row, "finished")


class TogetherTable:
    """A live table with a row for each member."""

    def __init__(self, console: Console, before: Callable[[], None] = lambda: None) -> None:
        """`before` is called before the table is drawn: a terminal has one live display."""
        self.console, self._before = console, before
        self.rows: list[TrialLine] = []
        self._live: Live | None = None

    def __call__(self, name: str) -> Progress:
        row = TrialLine(name)
        self.rows.append(row)
        return _Told(row, self._changed, lambda text: self.console.print(f"note: {text}", style="yellow"))

    def table(self) -> Table:
        """As it is now."""
        table = Table()
        for title in ("member", "step", "loss", "eval loss", "tokens/s of the pass", "left", "state"):
            table.add_column(title, justify="left" if title in ("member", "state") else "right")
        for row in self.rows:
            table.add_row(*row.cells(), style=STYLES.get(row.state))
        return table

    def _changed(self, row: TrialLine, what: str) -> None:  # noqa: ARG002
        if self._live is None and what == "started":
            self._before()
            self._live = Live(console=self.console, get_renderable=self.table, refresh_per_second=4)
            self._live.start()
        if self._live is not None and what == "finished" and all(row.state != "training" for row in self.rows):
            self._live.stop()
            self._live = None


class TogetherLines:
    """The same as plain lines: about ten a member, every validation, and how each ends."""

    def __init__(self, log: Callable[[str], None] = partial(print, flush=True)) -> None:
        self._line = log

    def __call__(self, name: str) -> Progress:
        return _Told(TrialLine(name), self._changed, lambda text: self._line(f"note: {text}"))

    def _changed(self, row: TrialLine, what: str) -> None:
        every = max(1, row.steps // LINES_A_MEMBER)
        if what == "stepped" and row.step % every == 0:
            self._line(
                f"{row.name}: step {row.step}/{row.steps}  loss {row.loss:.4f}{row.metrics}  "
                f"{row.speed:,.0f} tokens/s of the pass  "
                f"{row.left():,.0f} s left"
            )
        elif what == "validated":
            self._line(f"{row.name}: step {row.step}: validation loss {row.eval_loss:.4f}")
        elif what == "ended":
            self._line(f"{row.name}: {row.state} after step {row.step}")


def together_progress(log: Teller | None = None) -> TogetherTable | TogetherLines:
    """What fits where the lines of `log` go; left out, standard output."""
    log = log or Teller()
    return TogetherTable(log.console, log.quiet) if log.live else TogetherLines(log)
