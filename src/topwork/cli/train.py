"""`topwork train`. Imports what it needs when it runs, so that `--help` answers at once."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from topwork.cli.options import AsJson, Overrides, starting

EPILOG = (
    "Example: topwork train examples/support/recipe.yaml --set adapter.r=8\n\n"
    "topwork train recipe.yaml --model models/base --adapter someone/adapter"
)


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe, or the folder of a run.")],
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="The base, in place of the recipe's.")] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|ID",
            help="Train on from it: a run, any PEFT folder or an id on the Hub (adapter.init_from).",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run, from its newest whole checkpoint.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in output_dir.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter."""
    from topwork.run.which import which_recipe

    changes = [*(overrides or []), *_named(model, adapter, overrides or [])]
    read = which_recipe(recipe, changes, resume)
    log = starting(as_json)
    from topwork.run.console import training_progress
    from topwork.run.interrupted import RunInterrupted
    from topwork.run.train import train as run

    try:
        done = run(read, (), resume, overwrite, training_progress(log), log)
    except RunInterrupted as stopped:  # its work may have been done when the signal came
        done = stopped.done
    log.quiet()
    if as_json:
        print(json.dumps(done.result))
    if done.result["stopped"] == "interrupted":
        told = f"interrupted after step {done.result['steps']}; the checkpoint is kept. Go on with:"
        print(f"{told}\n  {_resuming(recipe, changes)}", file=sys.stderr)
        raise typer.Exit(1)
    if not as_json:
        _print_trained(done.folder, done.result)


def _named(model: str | None, adapter: str | None, overrides: list[str]) -> list[str]:
    """--model and --adapter as the options that they are. Raises RequestError where --set gives one of them too."""
    from topwork.common.errors import RequestError
    from topwork.recipe.pasted import setting

    said = {"model.model_name_or_path": ("--model", model), "adapter.init_from": ("--adapter", adapter)}
    for override in overrides:
        key, _ = setting(override) or ("", "")
        flag, given = said.get(key, ("", None))
        if given is not None:
            raise RequestError(f"{flag} {given}: --set {override} says the same option; give one of them")
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, (_, value) in said.items() if value is not None]


def _resuming(recipe: Path, overrides: list[str]) -> str:
    changes = [part for override in overrides for part in ("--set", override)]
    return shlex.join(["topwork", "train", str(recipe), *changes, "--resume"])


def _print_trained(folder: Path, result: dict[str, Any]) -> None:
    for line in trained_lines(folder, result):
        print(line)


def trained_lines(folder: Path, result: dict[str, Any]) -> list[str]:
    """How a run ended, for people."""
    run = shlex.quote(str(folder))
    steps = "1 step" if result["steps"] == 1 else f"{result['steps']:,} steps"
    if result["first_loss"] is None or result["tokens_per_second"] is None:  # metrics.jsonl was lost
        trained = [f"{steps}, of which metrics.jsonl has no loss any more"]
    else:
        trained = [
            f"training loss {result['first_loss']:.4f} -> {result['last_loss']:.4f}, {steps}",
            f"{result['tokens']:,} tokens in {result['seconds']:,.0f} s: {result['tokens_per_second']:,.0f} tokens/s, "
            f"peak memory {result['peak_memory_bytes'] / 2**20:,.0f} MiB",
        ]
    scored = run if result["plan"]["held_out_rows"] else f"{run} --data ROWS"  # which that command refuses without
    return [
        _validated(result),
        *trained,
        f"adapter: {folder / 'adapter'}",
        f"next: topwork eval {scored}      its answers beside the base's",
        f"      topwork chat {run}      ask it",
        f"      topwork report {run}    one page with curves and scores",
        f"      topwork merge {run} OUT    a model of its own",
    ]


def _validated(result: dict[str, Any]) -> str:
    """The loss on held-out rows, whether it is better than the base's, and how much that says."""
    from topwork.reporting.endings import too_few

    before, after, rows = result["eval_loss_before"], result["eval_loss_after"], result["plan"]["held_out_rows"]
    if before is None or after is None:
        return "no validation loss: nothing tells what was learned from what was learned by heart"
    first = result.get("begun_from") or "the base"
    better = f"better than {first}" if after < before else f"NOT better than {first} without this training"
    kept = result["best_step"] if after == result["best_eval_loss"] else result["steps"]
    losses = f"validation loss {before:.4f} -> {after:.4f}, the lower the better"
    few = ", which are few to go by" if too_few(rows) else ""
    on = f"on {rows:,} held-out row{'' if rows == 1 else 's'}{few if rows != 1 else ', which is little to go by'}"
    return f"{losses}: {better} {on}; the adapter is step {kept}'s"
