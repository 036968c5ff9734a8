"""`topwork report`."""

from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import Run

EPILOG = "Example: topwork report runs/support\n\ntopwork report runs/support --checkpoint best --out pages/support"


def report(
    run: Run,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="N|best|last", help="The run up to this checkpoint, with its scores; left out, as far as it came."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the page goes, instead of into RUN's folder.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Taken as by the other commands; a page needs no base, wherever it is.")
    ] = None,
) -> None:
    """Write a run's page: curves, scores, samples, counts, memory and speed."""
    from topwork.run.report import report as write

    paths = write(run, model=model, checkpoint=checkpoint, out=out)
    print(f"{paths.html}\n{paths.curves_png}")
