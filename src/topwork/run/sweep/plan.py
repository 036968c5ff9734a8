"""What `topwork sweep` will do, before it begins: its trials, what each needs, rungs, and the waves that fit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import JsonValue

from topwork.adapters.sizes import trained_sizes
from topwork.common.errors import RequestError
from topwork.data.batches import steps_per_epoch
from topwork.data.examples import load_data
from topwork.models.source import find_source
from topwork.models.structure import Structure
from topwork.models.tokenizer import open_tokenizer
from topwork.plan.base import structure_named
from topwork.recipe.grid import parse_grid
from topwork.recipe.sweep_config import Halving, PlannedTrial, SweepRequest, load_sweep
from topwork.run.folder import check_place
from topwork.run.presets import Experiment
from topwork.run.sweep.trials import model_of, trials_of
from topwork.training.passes import check_longest
from topwork.training.schedule import planned_steps, validated_every


@dataclass(frozen=True)
class SweepOptions:
    """What the command line adds to a recipe's `sweep:`; None leaves it as the recipe has it."""

    grid: tuple[str, ...] = ()
    preset: str | None = None
    seeds: int | None = None
    halving: bool | None = None
    measure_alone: bool = False


@dataclass(frozen=True)
class SweepPlan:
    """A sweep before it begins. `stops` are the steps at which halving compares; the last rung runs to the end.
    `longest` is the longest sequence of all trials, virtual tokens among them, where their rows were read."""

    trials: tuple[PlannedTrial, ...]
    axes: dict[str, list[JsonValue]]
    out: Path
    ready: Experiment | None = None
    jobs: bool = False
    halving: Halving | None = None
    stops: tuple[int, ...] = ()
    longest: int = 0


def plan_sweep(
    recipe: Path, overrides: Sequence[str] = (), options: SweepOptions = SweepOptions(), check_data: bool = True
) -> SweepPlan:
    """Read a recipe and work out its trials; the base's weights are not read. Rows are read once for each data set, so
    that a bad one is told before hours of training.

    Raises RequestError for whatever is wrong with the request; nothing is written.
    """
    request = _with_options(load_sweep(recipe, overrides), options)
    structure = _structure(request)
    found = trials_of(request, structure, options.grid)
    trials, out = found.trials, found.out
    check_place(out, "output_dir")
    for trial in trials:
        trained_sizes(structure, trial.recipe.adapter)  # says what the base cannot take
    shown: dict[str, list[JsonValue]] = {
        axis.label: [variant.shown for variant in axis.variants] for axis in found.axes
    }
    plan = SweepPlan(trials, shown, out, found.ready, bool(request.jobs), request.sweep.halving)
    if not plan.jobs:
        _refuse_unmeasured(trials)
    if not check_data:
        return plan
    steps, longest = _checked_data(trials, plan.jobs)
    stops = _stops(plan.halving, trials, steps) if plan.halving else ()
    return replace(plan, stops=stops, longest=longest)


def _with_options(request: SweepRequest, options: SweepOptions) -> SweepRequest:
    """The command line's grid, preset, seeds and halving over the recipe's."""
    sweep = request.sweep
    changes: dict[str, object] = {"grid": {**sweep.grid, **parse_grid(options.grid)}}
    if options.preset is not None:
        changes["preset"] = options.preset
    if options.seeds is not None:
        if options.seeds < 1:
            raise RequestError(f"--seeds is {options.seeds}; expected a count of at least 1")
        changes["seeds"] = options.seeds
    if options.halving is not None:
        changes["halving"] = (sweep.halving or Halving()) if options.halving else None
    return replace(request, sweep=sweep.model_copy(update=changes))


def _structure(request: SweepRequest) -> Structure:
    """The base's, by its config alone."""
    model = model_of(request)
    find_source(model, lambda _: None)  # says what is wrong with the name, or where its weights are missing
    return structure_named(model)


def _refuse_unmeasured(trials: Sequence[PlannedTrial]) -> None:
    for trial in trials:
        data, evaluation = trial.recipe.data, trial.recipe.evaluation
        if evaluation.data is None and data.eval is None and data.eval_fraction == 0:
            raise RequestError(
                "a sweep compares its members on rows that none was trained on, and there are none; name "
                "evaluation.data or data.eval, or set data.eval_fraction above 0"
            )


def _checked_data(trials: Sequence[PlannedTrial], jobs: bool) -> tuple[dict[str, int], int]:
    """Read every data set once; the planned steps of each trial by name, and the longest sequence. Raises DataError."""
    model = trials[0].recipe.model
    tokenizer, length = open_tokenizer(model)
    known: dict[str, tuple[int, int, int]] = {}
    scored: set[tuple[str, str]] = set()
    steps = {}
    for trial in trials:
        recipe = trial.recipe
        virtual = recipe.adapter.virtual_tokens
        read = f"{recipe.data.model_dump_json()} {virtual}"
        if read not in known:
            data = load_data(recipe.data, tokenizer, length - virtual, recipe.training.seed, lambda _: None)
            known[read] = len(data.train), len(data.eval), data.longest(virtual)
        rows, held_out, longest = known[read]
        check_longest(recipe.training.tokens_per_pass, longest)
        named = recipe.evaluation.data
        if named is None and not held_out and not jobs:
            raise RequestError(
                "a sweep compares its members on rows that none was trained on, and of these data none are left to "
                "hold out; name evaluation.data or data.eval, or give more rows"
            )
        if named is not None and (read, named) not in scored:
            load_data(recipe.data.reading(named), tokenizer, length - virtual, 0, lambda _: None)
            scored.add((read, named))
        steps[trial.name] = planned_steps(recipe.training, steps_per_epoch(rows, recipe.training.batch_size))
    return steps, max(longest for _, _, longest in known.values())


def _stops(halving: Halving, trials: Sequence[PlannedTrial], steps: dict[str, int]) -> tuple[int, ...]:
    """The steps at which trials are compared, each at a validation: the whole plan over factor, factor ** 2, …"""
    plans = {(steps[trial.name], trial.recipe.training.eval_steps) for trial in trials}
    if len(plans) > 1:
        told = ", ".join(f"{total} steps with eval_steps {every}" for total, every in sorted(plans, key=str)[:3])
        raise RequestError(
            f"halving compares members after the same steps, but these plan {told}; set training.max_steps and "
            "training.eval_steps the same for all"
        )
    ((total, eval_steps),) = plans
    for trial in trials:
        data = trial.recipe.data
        if data.eval is None and data.eval_fraction == 0:
            raise RequestError("halving compares validation losses; name data.eval or set data.eval_fraction above 0")
    every = validated_every(eval_steps, total)
    wanted = [total / halving.factor ** (halving.rungs - 1 - rung) for rung in range(halving.rungs - 1)]
    stops = [max(1, round(stop / every)) * every for stop in wanted]
    if sorted(set(stops)) != stops or (stops and stops[-1] >= total):
        raise RequestError(
            f"halving with {halving.rungs} rungs and factor {halving.factor} needs validations at about steps "
            f"{', '.join(f'{stop:.0f}' for stop in wanted)} of {total}, and they come every {every}; set "
            f"training.eval_steps to {max(1, int(wanted[0]))} or less, or give fewer rungs"
        )
    return tuple(stops)
