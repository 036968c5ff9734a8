"""What several commands share."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one option of the recipe.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder: the output_dir of `topwork train`.")]
Force = Annotated[bool, typer.Option("--force", help="Load an adapter onto another base than it was trained on.")]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        metavar="N|best|last",
        help="A checkpoint of the run: its step, the lowest validation loss's, the newest. Left out, the finished "
        "adapter, or the newest where there is none yet.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def teller(as_json: bool) -> Callable[[str], None]:
    """Where lines for people go: to standard error where a program reads the output."""
    return (lambda text: print(text, file=sys.stderr)) if as_json else print
