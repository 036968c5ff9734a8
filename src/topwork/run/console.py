"""Progress for people: a live bar on a terminal, plain lines where output is piped.

Nothing here imports torch: the first line stands before that takes its seconds.
"""

import builtins
import sys
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.text import Text

from topwork.training.metrics import metrics_text


class Teller:
    """A command's `log`: lines for people and, between them, what is being done. On a terminal that is a status which
    goes away, elsewhere it is a line of its own."""

    def __init__(self, file: TextIO | None = None, console: Console | None = None) -> None:
        """To standard output, unless another file, or a console, is given."""
        self.console = console or Console(file=file or sys.stdout)
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._status: Live | None = None

    def __call__(self, text: str) -> None:
        """A line."""
        if self.live:
            self.console.print(Text(text), soft_wrap=True)
        else:
            print(text, file=self.console.file, flush=True)

    def doing(self, text: str) -> None:
        """What is being done from now on, until something else is or `quiet` is called."""
        if not self.live:
            self(f"{text} ...")
            return
        spinner = Spinner("line", Text(f"{text} ..."))  # ASCII, for terminals that know nothing else
        if self._status is not None:
            self._status.update(spinner, refresh=True)
            return
        out, errors = (stream is self.console.file or stream.isatty() for stream in (sys.stdout, sys.stderr))
        self._status = Live(
            spinner, console=self.console, transient=True, redirect_stdout=out, redirect_stderr=errors
        )  # fmt: skip
        self._status.start(refresh=True)

    def quiet(self) -> None:
        """Nothing is being done any more, or something else shows it."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.quiet()


def bar_console(log: Callable[[str], None]) -> Console | None:
    """Where a bar may be drawn beside the lines that `log` tells, None where it may not; a status makes way for it."""
    if isinstance(log, Teller):
        log.quiet()
        return log.console if log.live else None
    return Console() if log is builtins.print and sys.stdout.isatty() else None


class TrainingBar:
    """One bar for the steps, with loss, tokens/s and time left; validations and notes stand above it."""

    def __init__(self, console: Console, before: Callable[[], None] = lambda: None) -> None:
        """`before` is called before the bar is drawn: a terminal has one live display."""
        self.console, self._before = console, before
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.4f}{task.fields[metrics]}  {task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def started(self, step: int, steps: int) -> None:
        self._task = self._bar.add_task("train", total=steps, completed=step, loss=float("nan"), speed=0.0, metrics="")
        self._before()
        self._bar.start()

    def stepped(self, step: int, record: dict[str, Any]) -> None:
        if self._task is not None:
            self._bar.update(
                self._task, completed=step, loss=record["loss"], speed=record["tokens_per_second"],
                metrics=metrics_text(record), refresh=True,
            )  # fmt: skip

    def validated(self, step: int, record: dict[str, Any]) -> None:
        self.console.print(_validation(step, record))

    def note(self, text: str) -> None:
        self.console.print(f"note: {text}", style="yellow")

    def ended(self, how: str) -> None: ...

    def finished(self) -> None:
        self._bar.stop()


class TrainingLines:
    """The same as plain lines: about thirty a run, the first step's among them, and every validation."""

    def __init__(self, log: Callable[[str], None] = partial(print, flush=True)) -> None:
        self._line = log
        self._steps, self._every, self._began, self._first = 0, 1, 0.0, 0

    def started(self, step: int, steps: int) -> None:
        self._steps, self._every, self._began, self._first = steps, max(1, steps // 30), time.perf_counter(), step

    def stepped(self, step: int, record: dict[str, Any]) -> None:
        if step % self._every == 0 or step in (self._first + 1, self._steps):
            spent = time.perf_counter() - self._began
            left = spent / (step - self._first) * (self._steps - step)
            self._line(
                f"step {step}/{self._steps}  loss {record['loss']:.4f}{metrics_text(record)}  "
                f"{record['tokens_per_second']:,.0f} tokens/s  "
                f"{left:,.0f} s left"
            )

    def validated(self, step: int, record: dict[str, Any]) -> None:
        self._line(_validation(step, record))

    def note(self, text: str) -> None:
        self._line(f"note: {text}")

    def ended(self, how: str) -> None: ...

    def finished(self) -> None: ...


def _validation(step: int, record: dict[str, Any]) -> str:
    told = f"step {step}: validation loss {record['loss']:.4f} (perplexity {record['perplexity']:.2f})"
    return told + metrics_text(record)


def training_progress(log: Teller | None = None) -> TrainingBar | TrainingLines:
    """What fits where the lines of `log` go; left out, standard output."""
    log = log or Teller()
    return TrainingBar(log.console, log.quiet) if log.live else TrainingLines(log)


class Counter:
    """`on_finished` for scoring: a bar where `log` writes to a terminal, a line per quarter to it elsewhere."""

    def __init__(self, what: str, total: int, log: Callable[[str], None]) -> None:
        self.what, self.total, self.done, self._told = what, total, 0, 0
        self._log, console = log, bar_console(log)
        self._bar = Progress(TextColumn(what), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                             TimeRemainingColumn(), console=console) if console is not None else None  # fmt: skip
        self._task = self._bar.add_task(what, total=total) if self._bar else None

    def __enter__(self) -> "Counter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, count: int) -> None:
        self.done += count
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self.done, refresh=True)
        elif self.done * 4 // self.total > self._told:
            self._told = self.done * 4 // self.total
            self._log(f"{self.what}: {self.done}/{self.total}")
