"""`topwork report`."""

from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.naming import Adapter, Model, named_first

EPILOG = (
    "Example: topwork report runs/support\n\ntopwork report runs/support --checkpoint best --out pages/support\n\n"
    "topwork report --model models/base --adapter someone/adapter --scores scores.json"
)


def report(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run's folder, or any PEFT folder.")] = None,
    model: Model = None,
    adapter: Adapter = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="N|best|last", help="The run up to this checkpoint, with its scores; left out, as far as it came."
        ),
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of an adapter alone: what `topwork eval --out FILE` wrote.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Where the page goes, instead of into RUN's folder, or into reports/ for an adapter."
        ),
    ] = None,
) -> None:
    """Write a page of a run, or of any adapter: curves, scores, samples, counts, memory and speed."""
    place, _ = named_first((run,), adapter, ("RUN",))
    from topwork.run.report import report as write

    paths = write(place, model=model, checkpoint=checkpoint, out=out, scores=scores)
    print("\n".join(str(path) for path in (paths.html, paths.curves_png) if path is not None))
