"""`topwork eval`. Imports what it needs when it runs, so that `--help` answers at once."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from topwork.cli.naming import Adapter, named_first
from topwork.cli.options import AsJson, Checkpoint, Force, starting

if TYPE_CHECKING:
    from topwork.run.console import Teller

EPILOG = (
    "Example: topwork eval runs/support --data examples/support/test.jsonl\n\n"
    "topwork eval runs/support --checkpoint best --model /data/models/base --out scores.json\n\n"
    "topwork eval --model models/base --adapter someone/adapter --data rows.jsonl"
)


def evaluate(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run's folder, or any PEFT folder.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows to score: a file, folder or Hub id.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Score only so many rows.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The base, where the run or the adapter's file does not name it rightly; alone: any base."),
    ] = None,
    adapter: Adapter = None,
    checkpoint: Checkpoint = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, without RUN.")] = 256,
    only_after: Annotated[bool, typer.Option("--only-after", help="Leave the bare base out.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the scores go, instead of into RUN's folder.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Score a run, or any adapter: loss, exact answers, JSON fields, before and after."""
    from topwork.common.errors import RequestError

    if run is None and adapter is None and model is None:
        raise RequestError(
            "give a run's folder, or --model for a base alone, or --adapter with a PEFT folder or an id on the Hub"
        )
    bare = run is None and adapter is None
    place = None if bare else named_first((run,), adapter, ("RUN",))[0]
    if bare and checkpoint is not None:
        raise RequestError(f"--checkpoint {checkpoint}: only a run has them; give its folder")
    log = starting(as_json)
    from topwork.run.evaluate import evaluate as score_run
    from topwork.run.given import is_alone

    if place is not None and not is_alone(place, model):
        result = score_run(
            place, data, max_rows, not only_after, force, log, model=model, checkpoint=checkpoint, out=out
        )  # fmt: skip
    else:
        if checkpoint is not None:
            raise RequestError(f"--checkpoint {checkpoint}: {place} is no run, and only runs have them")
        result = _evaluate_model(model, data, place, max_rows, max_new_tokens, force, log, out)
    log.quiet()
    if as_json:
        print(json.dumps(result))
    else:
        _print_scores(result)
    if "not_written" in result:
        raise typer.Exit(1)


def _evaluate_model(
    model: str | None, data: str | None, adapter: Path | str | None, max_rows: int | None, max_new_tokens: int,
    force: bool, log: "Teller", out: Path | None,
) -> dict[str, Any]:  # fmt: skip
    from topwork.common.errors import RequestError
    from topwork.data.config import DataConfig
    from topwork.evaluation.config import EvaluationConfig
    from topwork.models.config import ModelConfig
    from topwork.run.evaluate import evaluate_model

    if data is None:
        raise RequestError("without a run there are no rows of its own: give --data, rows with known answers")
    config = EvaluationConfig(data=data, max_rows=max_rows, max_new_tokens=max_new_tokens)
    named = ModelConfig(model_name_or_path=model) if model is not None else None
    return evaluate_model(
        named, DataConfig(train=data), config, adapter, force, log=log,
        out=out,
    )  # fmt: skip


def _print_scores(result: dict[str, Any]) -> None:
    arms = [arm for arm in ("before", "after") if arm in result]
    step = f", checkpoint of step {result['checkpoint']}" if "checkpoint" in result else ""
    print(f"{result['rows']} rows, graded as {result['grader']}{step}")
    print(f"{'':24}" + "".join(f"{arm:>12}" for arm in arms))
    for key in ("loss", "json_valid", "exact_match"):
        if key in result[arms[0]]:
            print(f"{key.replace('_', ' '):24}" + "".join(_figure(key, result[arm][key]) for arm in arms))
    for key in result[arms[0]].get("fields", {}):
        print(f"  {key:22}" + "".join(_figure(key, result[arm]["fields"].get(key, 0.0)) for arm in arms))


def _figure(key: str, value: float) -> str:
    return f"{value:12.4f}" if key == "loss" else f"{value:12.1%}"
