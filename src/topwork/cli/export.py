"""`topwork export` as the command line takes it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.naming import Adapter, Model, named_first, needed
from topwork.cli.options import AsJson, Checkpoint, Force, starting
from topwork.common.paths import plain_path

EPILOG = (
    "Example: topwork export runs/support exported/support --format vllm\n\n"
    "topwork export runs/support support-gguf --format gguf --type q8_0\n\n"
    "topwork export --model smollm2-135m --adapter someone/adapter out --format gguf-adapter --dry-run"
)

SHOWN = ("method", "rank", "max_lora_rank", "modules", "file", "model", "architecture", "bytes", "dtype", "tensors")
"""Figures that are printed; export.json has them all."""


def export(
    place: Annotated[
        str | None,
        typer.Argument(metavar="[RUN|ADAPTER|MODEL]", help="A run's folder, a PEFT folder, or a model."),
    ] = None,
    out: Annotated[str | None, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)] = None,
    *,
    format: Annotated[
        str,
        typer.Option("--format", help="peft, vllm, sglang, lorax or gguf-adapter: the adapter. hf or gguf: the model, "
                     "an adapter merged into it. ollama: both."),
    ],
    kind: Annotated[
        str | None, typer.Option("--type", help="Numbers in a GGUF: f16, bf16, f32, q8_0, q4_0, q4_1, q5_0 or q5_1.")
    ] = None,
    model: Model = None,
    adapter: Adapter = None,
    checkpoint: Checkpoint = None,
    check: Annotated[
        int, typer.Option(min=0, max=8, help="Compare the reader's logits on so many prompts; 0 loads no base.")
    ] = 4,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what the reader would make of it, and what is done.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write an adapter or a model in the format that another program reads."""
    given, (named,) = named_first((place, out), adapter, ("RUN, ADAPTER or MODEL", "OUT"))
    folder = Path(plain_path(needed(named, "OUT", "name a new folder for the export")))
    log = starting(as_json)
    from topwork.run.export import export as run
    from topwork.run.exporting.written import line_with

    done = run(
        given, folder, format, kind, model, overwrite, force, dry_run, check, log, checkpoint=checkpoint,
        adapter=adapter is not None,
    )  # fmt: skip
    log.quiet()
    if as_json:
        print(json.dumps(done.as_json()))
        return
    if dry_run:
        print(f"nothing else stands between it and {done.reader}; nothing was written")
        return
    shown = {key: value for key, value in done.figures.items() if isinstance(value, int | str) and key in SHOWN}
    figures = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())
    print(f"written to {folder} for {done.reader}" + (f": {figures}" if figures else ""))
    for each in done.read_back:
        print(f"read back by {each.line()}")
    for line in done.use:
        print(f"  {line_with(line, folder)}")
