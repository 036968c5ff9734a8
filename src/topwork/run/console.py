"""Progress for people: a live bar on a terminal, plain lines where output is piped."""

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from topwork.training.metrics import metrics_text


class TrainingBar:
    """One bar for the steps, with loss, tokens/s and time left; validations and notes stand above it."""

    def __init__(self, console: Console) -> None:
        self.console = console
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
    """The same as plain lines: about thirty a run, and every validation."""

    def __init__(self) -> None:
        self._steps, self._every, self._began, self._first = 0, 1, 0.0, 0

    def started(self, step: int, steps: int) -> None:
        self._steps, self._every, self._began, self._first = steps, max(1, steps // 30), time.perf_counter(), step

    def stepped(self, step: int, record: dict[str, Any]) -> None:
        if step % self._every == 0 or step == self._steps:
            spent = time.perf_counter() - self._began
            left = spent / (step - self._first) * (self._steps - step)
            _line(
                f"step {step}/{self._steps}  loss {record['loss']:.4f}{metrics_text(record)}  "
                f"{record['tokens_per_second']:,.0f} tokens/s  "
                f"{left:,.0f} s left"
            )

    def validated(self, step: int, record: dict[str, Any]) -> None:
        _line(_validation(step, record))

    def note(self, text: str) -> None:
        _line(f"note: {text}")

    def ended(self, how: str) -> None: ...

    def finished(self) -> None: ...


def _validation(step: int, record: dict[str, Any]) -> str:
    told = f"step {step}: validation loss {record['loss']:.4f} (perplexity {record['perplexity']:.2f})"
    return told + metrics_text(record)


def training_progress() -> TrainingBar | TrainingLines:
    """What fits where the output goes."""
    return TrainingBar(Console()) if sys.stdout.isatty() else TrainingLines()


class Counter:
    """`on_finished` for scoring: a bar on a terminal, a line per quarter to `log` elsewhere."""

    def __init__(self, what: str, total: int, log: Callable[[str], None]) -> None:
        self.what, self.total, self.done, self._told = what, total, 0, 0
        self._log = log
        self._bar = Progress(TextColumn(what), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                             TimeRemainingColumn()) if sys.stdout.isatty() else None  # fmt: skip
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


def _line(text: str) -> None:
    print(text, flush=True)
