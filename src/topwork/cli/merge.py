"""`topwork merge` as the command line takes it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import AsJson, Force, Run, teller


def merge(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; left out, the recipe's.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="After QLoRA: `dequantized`, the weights that were trained on, or `16bit`, the original."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Fold the adapter into its base and write an ordinary Hugging Face folder."""
    from topwork.run.merge import merge as fold

    result = fold(run, out, dtype, base, overwrite, force, teller(as_json))
    if as_json:
        print(json.dumps(result))
        return
    print(f"merged in {result['dtype']} and compared on {result['sequences']} inputs:")
    for key, value in result.items():
        if isinstance(value, float):
            print(
                f"  {key.replace('_', ' '):32} {value:.3g}"
                if abs(value) < 1
                else f"  {key.replace('_', ' '):32} {value:,.1f}"
            )
    print(f"written to {out}")
