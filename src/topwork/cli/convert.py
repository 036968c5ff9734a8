"""`topwork convert` as the command line takes it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import AsJson, starting

EPILOG = (
    "Example: topwork convert support.gguf adapters/support --model smollm2-135m\n\n"
    "topwork convert ~/mlx/adapters adapters/support --model Qwen/Qwen3-0.6B"
)


def convert(
    place: Annotated[
        Path,
        typer.Argument(metavar="IN", help="A .gguf model or LoRA adapter, mlx-lm's adapter folder, or a PEFT folder."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    model: Annotated[
        str | None, typer.Option(help="An adapter's base: an alias, a folder, a .gguf file or a Hub id.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a model or an adapter of another program's into a folder that is read here."""
    log = starting(as_json)
    from topwork.run.convert import convert as turned

    done = turned(place, out, model, overwrite, log)
    log.quiet()
    if as_json:
        print(json.dumps(done.as_json()))
        return
    if done.made == "model":
        print(f"{done.file} is a Hugging Face folder now: {out}")
        return
    tried = ", and fits its base" if done.fitted else "; name its base with --model to try it on that"
    print(f"{done.file} ({done.kind}) is a PEFT folder now: {done.modules} modules{tried}\nwritten to {out}")
