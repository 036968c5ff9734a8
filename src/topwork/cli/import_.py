"""`topwork import`. Imports what it needs when it runs, so that `--help` answers at once."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import AsJson

EPILOG = (
    "Without --out the recipe is printed, and what became of each key to standard error. Something that is missing "
    "ends "
    "with 2, and nothing is written unless --partial is given. Python and notebooks are parsed, never run.\n\n"
    "Example: topwork import qlora-1b.yml --out recipe.yaml\n\n"
    "topwork import train.sh --from trl --devices 4 --out recipe.yaml"
)


def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A YAML or JSON config, a command line in a .sh, a .py or .ipynb.")
    ],
    tool: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="TOOL", help="axolotl, llamafactory, trl, unsloth, torchtune or mlx-lm; else by its keys."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the recipe to a new file.")] = None,
    devices: Annotated[
        int | None, typer.Option(help="On how many devices it was meant to run; its batch is for each.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Write what there is, where something is missing.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Tell of every key, not only of those that differ.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a recipe of another tool's training config, and say line by line what has no equal here."""
    from topwork.run.import_ import import_recipe, refuse_unusable, write_recipe

    imported = import_recipe(file, tool, devices)
    if as_json:
        print(json.dumps(imported.as_json(), default=str))
    else:
        print(imported.as_text(everything), file=sys.stdout if out else sys.stderr)
    if out is not None:
        write_recipe(imported, out, partial)
        print(f"written to {out}", file=sys.stderr if as_json else sys.stdout)
        return
    refuse_unusable(imported, partial)
    if not as_json:
        print(imported.recipe, end="")
