"""`topwork count`. Imports what it needs when it runs, so that `--help` answers at once."""

import json
from typing import Annotated

import typer

from topwork.cli.options import AsJson, Overrides, starting

EPILOG = "Example: topwork count llama-3-8b --rank 16"


def count(
    what: Annotated[
        str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe, or a model's name, folder or config.json.")
    ],
    rank: Annotated[list[int] | None, typer.Option(help="Ranks of the table; may be given several times.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Table trainable, frozen and total parameters per target set and rank, from the configuration alone."""
    log = starting(to_errors=True, doing="reading the config")
    from topwork.run.count import count as counted

    result = counted(what, rank, overrides or [], log)
    log.quiet()
    print(json.dumps(result.as_json()) if as_json else result.as_text())
