"""`topwork plan`. Imports what it needs when it runs, so that `--help` answers at once."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import AsJson, Overrides

EPILOG = (
    'Example: topwork plan examples/support/recipe.yaml --device "RTX 4090"\n\n'
    "topwork plan --calibrate\n\n"
    "topwork plan llama-3-8b --memory 24GB --set quantization.load_in_4bit=true --compare"
)


def plan(
    what: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE|MODEL", help="A recipe, a run's folder, or a model: its name or config.json."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="CARD", help='A card in place of this machine: "RTX 4090", T4, H100 …')
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="So much memory in place of this machine's: 24GB, 24GiB, 24.")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also full fine-tuning, LoRA and QLoRA on all devices: which fit, how long."),
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure steps on this machine first, about a minute, and keep that.")
    ] = False,
    devices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Cards of your own, as topwork/plan/devices.yaml has them.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Tell memory, time and cost before a run, what fits, and what to change where it does not; reads no weights."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing is forked here
    from topwork.run.plan import plan as run

    if what is None:
        _general_rates(calibrate, as_json)
        return
    log = _telling if calibrate else (lambda _: None)
    found = run(what, overrides or [], device, memory, compare, calibrate, devices, log)
    print(json.dumps(found.as_json()) if as_json else found.as_text())


def _general_rates(calibrate: bool, as_json: bool) -> None:
    """This machine's rates, where no recipe is named."""
    from topwork.common.errors import RequestError

    if not calibrate:
        raise RequestError(
            "no recipe and no model was given; name one, for example topwork plan recipe.yaml, or give --calibrate "
            "alone to measure this machine"
        )
    from topwork.run.calibrate import calibrate_machine

    found = calibrate_machine(log=_telling)
    if as_json:
        print(json.dumps([{"step_seconds": one.seconds, "source": one.source} for one in found]))
    else:
        print("kept: plans of recipes that were not measured are reckoned from these")


def _telling(line: str) -> None:
    print(line, file=sys.stderr)
