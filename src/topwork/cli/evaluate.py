"""`topwork eval`. Imports what it needs when it runs, so that `--help` answers at once."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from topwork.cli.options import AsJson, Checkpoint, Force, teller

EPILOG = (
    "Example: topwork eval runs/support --data examples/support/test.jsonl\n\n"
    "topwork eval runs/support --checkpoint best --model /data/models/base --out scores.json\n\n"
    "topwork eval --model models/base --adapter downloads/adapter --data rows.jsonl"
)


def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run's folder.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows to score: a file, folder or Hub id.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Score only so many rows.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="With RUN its base, where it is no longer where the run names it. Without: any base …"),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="… and any PEFT folder on top of it.")] = None,
    checkpoint: Checkpoint = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, without RUN.")] = 256,
    only_after: Annotated[bool, typer.Option("--only-after", help="Leave the bare base out.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the scores go, instead of into RUN's folder.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Score a run: loss, exact answers, JSON fields, before and after."""
    from topwork.common.errors import RequestError

    if run is None and model is None:
        raise RequestError("give a run's folder, or --model with --data and perhaps --adapter")
    if run is not None and adapter is not None:
        raise RequestError(f"--adapter {adapter}: {run} has its own; leave one of them out")
    if run is None and checkpoint is not None:
        raise RequestError(f"--checkpoint {checkpoint}: only a run has them; give its folder")
    if run is not None:
        from topwork.run.evaluate import evaluate as score_run

        result = score_run(
            run, data, max_rows, not only_after, force, teller(as_json), model=model, checkpoint=checkpoint, out=out
        )
    else:
        result = _evaluate_model(str(model), data, adapter, max_rows, max_new_tokens, force, as_json, out)
    if as_json:
        print(json.dumps(result))
    else:
        _print_scores(result)
    if "not_written" in result:
        raise typer.Exit(1)


def _evaluate_model(
    model: str, data: str | None, adapter: Path | None, max_rows: int | None, max_new_tokens: int, force: bool,
    as_json: bool, out: Path | None,
) -> dict[str, Any]:  # fmt: skip
    from topwork.common.errors import RequestError
    from topwork.data.config import DataConfig
    from topwork.evaluation.config import EvaluationConfig
    from topwork.models.config import ModelConfig
    from topwork.run.evaluate import evaluate_model

    if data is None:
        raise RequestError("--model needs --data: rows with known answers")
    config = EvaluationConfig(data=data, max_rows=max_rows, max_new_tokens=max_new_tokens)
    return evaluate_model(
        ModelConfig(model_name_or_path=model), DataConfig(train=data), config, adapter, force, log=teller(as_json),
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
