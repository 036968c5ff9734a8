"""`topwork init`. Imports what it needs when it runs, so that `--help` answers at once."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import AsJson, Overrides, Overwrite

EPILOG = (
    "Example: topwork init smollm2-135m train.csv\n\n"
    "topwork init Qwen/Qwen2.5-7B-Instruct data/ --device 'RTX 3060' --out support.yaml\n\n"
    "topwork init smollm2-135m rows.csv --set 'data.columns: {prompt: mr, completion: ref}'"
)


def init(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="The base: an alias, folder, .gguf file, Hub id (`topwork models`)."),
    ],
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help="Files, a folder, or a Hub data set. Files called after validation or test are held out.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE.yaml", help="Where the recipe goes.")] = Path("recipe.yaml"),
    task: Annotated[
        str | None, typer.Option(help="What is to be learned, as `topwork advise` has it; left out, recognised.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Make it fit a card, 'RTX 4090'; left out, this machine.")] = None,
    memory: Annotated[str | None, typer.Option(help="The same by memory alone: 24GB.")] = None,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a recipe for a base and your rows: every line says why, it fits, and it trains as it stands."""
    from topwork.run.console import Teller
    from topwork.run.init import init as begin

    log = Teller(sys.stderr if as_json else sys.stdout)
    begun = begin(
        model, data, out, task=task, device=device, memory=memory, overrides=overrides or [], overwrite=overwrite,
        log=log,
    )  # fmt: skip
    if as_json:
        print(json.dumps(begun.as_json()))
        return
    print("\n".join([*begun.told, f"wrote {begun.path}"]))
    path = shlex.quote(str(begun.path))
    print(f"next: topwork lint {path}     rows as the model will see them")
    print(f"      topwork plan {path}     memory, time and cost")
    print(f"      topwork train {path}")
