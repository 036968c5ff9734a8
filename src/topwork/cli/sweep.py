"""`topwork sweep`. Imports what it needs when it runs, so that `--help` answers at once."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.options import AsJson, Overrides, teller

EPILOG = (
    "Example: topwork sweep recipe.yaml --preset rank --seeds 3\n\n"
    "topwork sweep recipe.yaml --grid adapter.r=4,8,16 --grid training.learning_rate=1e-4..1e-2*5 --halving"
)


if TYPE_CHECKING:
    from topwork.reporting.sweep_state import Estimate, SweepState
    from topwork.run.sweep.plan import SweepOptions

PRESETS = "rank, targets, scaling, learning-rate or methods"


def sweep(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A YAML recipe; it may have a sweep: or jobs: section.")
    ],
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUES",
            help="Values of an option: a list 2,4,8, a range 0..0.2:0.05, or so many between two, evenly in the "
            "logarithm, 1e-4..1e-2*5. Several --grid give every combination.",
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"A ready experiment: {PRESETS}.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Train every member with so many seeds; give means.")] = None,
    halving: Annotated[
        bool | None,
        typer.Option("--halving/--no-halving", help="Successive halving: only the best members go on to the end."),
    ] = None,
    measure_alone: Annotated[
        bool, typer.Option("--measure-alone", help="Measure each alone as well, for a few steps.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the members, train nothing.")] = False,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is not finished.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a sweep that is in output_dir.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train many adapters over one base in one pass, and compare them in one report."""
    from topwork.run.sweep.plan import SweepOptions

    options = SweepOptions(tuple(grid or ()), preset, seeds, halving, measure_alone)
    if dry_run:
        _listed(recipe, overrides or [], options, as_json)
        return
    from topwork.run.console_together import together_progress
    from topwork.run.interrupted import RunInterrupted
    from topwork.run.sweep.run import sweep as run

    progress = None if as_json else together_progress
    try:
        done = run(recipe, overrides or [], options, resume, overwrite, progress, teller(as_json))
    except RunInterrupted as stopped:
        done = stopped.done
    if as_json:
        print(json.dumps(done.result))
    if done.stopped == "interrupted":
        print(f"interrupted; what is trained is kept. Go on with:\n  {_resuming()}", file=sys.stderr)
        raise typer.Exit(1)
    if not as_json:
        _print_points(done.state)
        print(f"report: {done.folder / 'sweep.html'}   {done.folder / 'sweep.md'}   {done.folder / 'sweep.json'}")


def _listed(recipe: Path, overrides: list[str], options: "SweepOptions", as_json: bool) -> None:
    """The members of a sweep that is not run."""
    from topwork.run.sweep.plan import plan_sweep
    from topwork.run.sweep.run import tell_plan

    plan = plan_sweep(recipe, overrides, options)
    if as_json:
        members = [
            {"name": trial.name, "output_dir": trial.recipe.output_dir, "values": trial.values} for trial in plan.trials
        ]
        print(json.dumps({"output_dir": str(plan.out), "members": members, "stops": list(plan.stops)}))
    else:
        tell_plan(plan, print)


def _resuming() -> str:
    """The command as it was typed, to go on."""
    given = [argument for argument in sys.argv[1:] if argument not in ("--overwrite", "--resume")]
    return shlex.join(["topwork", *given, "--resume"])


def _print_points(sweep: "SweepState") -> None:
    graded = any(point.accuracy for point in sweep.points)
    width = max(12, *(len(point.name) for point in sweep.points)) + 2
    print(f"{'':{width}}{'loss':>20}" + (f"{'exact answers':>20}" if graded else ""))
    for point in sweep.points:
        loss, share = _figure(point.loss, 1, "", 4), _figure(point.accuracy, 100, " %", 1)
        ended = f"  {point.diverged} of {len(point.names)} diverged" if point.diverged else ""
        ended += "  left at a rung" if point.left else ""
        print(f"{point.name:{width}}{loss:>20}" + (f"{share:>20}" if graded else "") + ended)
    for verdict in sweep.diminishing_returns:
        print(verdict.sentence)


def _figure(estimate: "Estimate | None", scale: float, unit: str, digits: int) -> str:
    if estimate is None:
        return "-"
    error = f" ± {scale * estimate.error:.{digits}f}" if estimate.error is not None else ""
    return f"{scale * estimate.mean:.{digits}f}{error}{unit}"
