"""`topwork compare` as the command line takes it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import AsJson, starting

EPILOG = "Example: topwork compare runs/support runs/terse --layers"


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A run or a PEFT folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another of the same base.")],
    model: Annotated[
        str | None, typer.Option(help="The base of PEFT folders, where their own name for it is not found here.")
    ] = None,
    base: Annotated[
        bool,
        typer.Option("--base", help="Read the base's weights too, and tell how large the changes are beside them."),
    ] = False,
    layers: Annotated[bool, typer.Option("--layers", help="A row for every module, not for every kind.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Compare adapters of different bases all the same.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell how alike two adapters are: cosine and norm of their changes of each module, and what of one lies in the
    other."""
    log = starting(to_errors=True)
    from topwork.run.likeness import compare_adapters

    found = compare_adapters(first, second, model, base, force, log)
    log.quiet()
    print(json.dumps(found.as_json()) if as_json else found.as_text(layers))
