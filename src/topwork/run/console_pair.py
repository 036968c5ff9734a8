"""Two answers as they are written: in columns on a terminal, one after the other where output is piped."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

STYLES = ("green", "magenta")
_AROUND = 4
"""Lines of the screen that are not the answers'."""
_BESIDE = 4
"""Columns of a panel's frame."""


class Shown(Protocol):
    """Takes pieces of answers: which side, and what came."""

    def add(self, side: int, piece: str) -> None:
        """A piece more."""
        ...


class Columns:
    """On a terminal. While answers are written, the ends of those that are longer than the screen are seen."""

    def __init__(self, labels: Sequence[str], console: Console, live: Live) -> None:
        self.labels, self.console, self.live = labels, console, live
        self.texts = ["" for _ in labels]

    def add(self, side: int, piece: str) -> None:
        """A piece more; the terminal is drawn a few times a second."""
        self.texts[side] += piece
        self.live.update(self.drawn(self.console.size.height - _AROUND))

    def drawn(self, most: int | None = None) -> Table:
        """Both, or so many lines of each."""
        table = Table.grid(expand=True)
        for _ in self.labels:
            table.add_column(ratio=1)
        width = self.console.size.width // len(self.labels) - _BESIDE
        panels = []
        for label, text, style in zip(self.labels, self.texts, STYLES):
            lines = Text(text).wrap(self.console, width)
            seen = Text("\n").join(lines if most is None else lines[-most:])
            panels.append(Panel(seen, title=Text(label), title_align="left", border_style=style))
        table.add_row(*panels)
        return table


class Whole:
    """Piped: nothing until both are there."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels, self.texts = labels, ["" for _ in labels]

    def add(self, side: int, piece: str) -> None:
        """A piece more."""
        self.texts[side] += piece


@contextmanager
def both_shown(labels: Sequence[str], console: Console | None = None) -> Iterator[Shown]:
    """Shows what is added, and all of it at the end."""
    console = console or Console(file=sys.stdout)
    if not console.is_terminal:
        whole = Whole(labels)
        yield whole
        print("\n\n".join(f"{label}:\n{text}" for label, text in zip(labels, whole.texts)), flush=True)
        return
    with Live(console=console, refresh_per_second=12, transient=True) as live:
        columns = Columns(labels, console, live)
        yield columns
    console.print(columns.drawn())
