"""`topwork recipes`. Imports what it needs when it runs, so that `--help` answers at once."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import AsJson, Overwrite

EPILOG = (
    "Example: topwork recipes classification --out my-labels\n\n"
    "topwork recipes tool-calls --rows; a recipe of your own model and data: topwork init MODEL DATA"
)


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The recipe to print or write.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER|FILE.yaml", help="Write the recipe and its example rows there, to be changed."),
    ] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Print its example rows: how data for the job look.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Recipes for the usual jobs: list them, print one, or write one with example rows to begin from."""
    from topwork.common.errors import RequestError
    from topwork.run.recipes import copy_recipe, shipped_recipe, shipped_recipes

    if name is None:
        if out is not None or rows:
            raise RequestError("which recipe? `topwork recipes` lists them, `topwork recipes NAME --out FOLDER` writes")
        found = shipped_recipes()
        wide = max(len(each.name) for each in found)
        listed = "\n".join(f"{each.name:{wide}}  {each.job}" for each in found)
        after = "topwork recipes NAME prints one, --rows its example rows, --out FOLDER writes both"
        print(json.dumps([each.as_json() for each in found]) if as_json else f"{listed}\n\n{after}")
        return
    shipped = shipped_recipe(name)
    written = copy_recipe(name, out, overwrite) if out is not None else None
    if as_json:
        paths = {} if written is None else {"written": [str(path) for path in written]}
        print(json.dumps({**shipped.as_json(), **paths}))
    elif written is not None:
        recipe, data = written
        print(f"{recipe}\n{data}: example rows; put yours in their place")
        path = shlex.quote(str(recipe))
        print(f"next: topwork lint {path}\n      topwork train {path}")
    else:
        print((shipped.rows if rows else shipped.text).rstrip("\n"))
