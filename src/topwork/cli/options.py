"""What several commands share."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

if TYPE_CHECKING:
    from topwork.run.console import Teller

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
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def starting(to_errors: bool, doing: str = "loading torch and transformers") -> "Teller":
    """A command's `log`, which says at once what the first seconds are for: call it before torch is imported, and its
    `quiet` before results are printed. To standard error where a program, or a file, gets what is printed."""
    from topwork.run.console import Teller

    log = Teller(sys.stderr if to_errors else sys.stdout)
    context = click.get_current_context(silent=True)
    if context is not None:
        context.call_on_close(log.quiet)
    log.doing(doing)
    return log
