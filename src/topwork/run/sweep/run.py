"""`topwork sweep`: many runs over one loaded base, in waves of as many as fit into memory, and one report of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from pathlib import Path
from typing import Any

from topwork.adapters.peft_format import load_adapter, read_adapter
from topwork.common.errors import NonFiniteLossError, RequestError
from topwork.common.locks import locked
from topwork.common.os_errors import explained
from topwork.common.streams import sure
from topwork.recipe.recipe import Recipe
from topwork.reporting.sweep import write_sweep_report
from topwork.reporting.sweep_points import diminishing_returns, points
from topwork.reporting.sweep_state import SweepState, TrialState, Wave
from topwork.run.begin import check_request
from topwork.run.evaluate import Finished, evaluate_members
from topwork.run.fit import refuse_large_members, trials_that_fit
from topwork.run.folder import ADAPTER
from topwork.run.interrupted import RunInterrupted
from topwork.run.outcome import TrainedRun
from topwork.run.ownership import is_run
from topwork.run.session import Session, open_session
from topwork.run.sweep.cost import cost, measure_alone, take_pass_cost
from topwork.run.sweep.plan import SweepOptions, SweepPlan, plan_sweep
from topwork.run.sweep.state import clear, discard, earlier_runs, open_state, result_of, take_scores
from topwork.run.sweep.trials import waves
from topwork.run.train import train_held
from topwork.run.vocabulary import base_id
from topwork.training.progress import Progress

ENDED = (TrialState.FINISHED, TrialState.EARLY_STOPPING, TrialState.DIVERGED)
Log = Callable[[str], None]


@dataclass(frozen=True)
class Swept:
    """A sweep's folder, and all that it found. `stopped` is finished, or interrupted in what RunInterrupted carries."""

    folder: Path
    state: SweepState
    stopped: str

    @property
    def result(self) -> dict[str, Any]:
        """All that was found as plain values, as in sweep.json."""
        return self.state.as_json()


@dataclass(frozen=True)
class _Sweep:
    """A sweep under way."""

    plan: SweepPlan
    state: SweepState
    resumed: bool
    overwrite: bool
    progress: Callable[[], Callable[[str], Progress]] | None
    log: Log
    on: Session
    trained: dict[str, str] = field(default_factory=dict)
    """Trials whose adapters are on the base, and their names there."""

    def save(self) -> None:
        self.state.save(self.plan.out)

    def recipe(self, name: str) -> Recipe:
        return next(trial.recipe for trial in self.plan.trials if trial.name == name)


@explained()
def sweep(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    options: SweepOptions = SweepOptions(),
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[], Callable[[str], Progress]] | None = None,
    log: Log = print,
) -> Swept:
    """Train all trials of a sweep over one base, score them on the same rows and write OUT/sweep.{json,md,html}.

    Each trial is an ordinary run in OUT/NAME. `progress` is asked at each wave for what gives trials' Progress by
    name. `resume` goes on with what is not finished. Raises RequestError where
    something is wrong with the request (nothing is written then), RunError where the sweep fails, and RunInterrupted,
    which is a KeyboardInterrupt, once a signal has stopped a training and what is trained is saved.
    """
    if Path(recipe).is_dir():
        raise RequestError(
            f"{recipe} is a folder; give the recipe that the sweep was begun with, and --set output_dir=… where it went"
        )
    plan = plan_sweep(Path(recipe), overrides, options)
    with locked([plan.out]):
        runs = [Path(trial.recipe.output_dir) for trial in plan.trials]
        with locked([*runs, *(earlier_runs(plan.out) if overwrite else ())]):
            return _held(plan, options, resume, overwrite, progress, log)


def _held(
    plan: SweepPlan, options: SweepOptions, resume: bool, overwrite: bool,
    progress: Callable[[], Callable[[str], Progress]] | None, log: Log,
) -> Swept:  # fmt: skip
    """A sweep in folders that this process holds."""
    state = open_state(plan, resume, overwrite)
    resumed = resume and bool(state.waves)
    log = sure(log)
    tell_plan(plan, log)
    if not _is_done(plan, state):
        refuse_large_members([trial.recipe for trial in plan.trials], plan.longest, log)
        on = open_session(plan.trials[0].recipe, log)
        if overwrite:
            clear(plan.out)
        try:
            _trained(_Sweep(plan, state, resumed, overwrite, progress, log, on))
        except RunInterrupted as stopped:
            stopped.done = Swept(plan.out, state, "interrupted")
            raise
    if options.measure_alone:
        measure_alone(plan.out, state, {trial.name: trial.recipe for trial in plan.trials}, log)
    state.points, state.diminishing_returns, state.cost = points(state), diminishing_returns(state), cost(state)
    state.save(plan.out)
    write_sweep_report(plan.out, log)
    return Swept(plan.out, state, "finished")


def _is_done(plan: SweepPlan, state: SweepState) -> bool:
    """Whether nothing is left to train or to score, so that the report alone is made anew."""
    last = [wave for wave in state.waves if wave.rung == len(plan.stops)]
    return bool(last) and all(wave.done and wave.scored for wave in last)


def tell_plan(plan: SweepPlan, log: Log) -> None:
    """What will be trained."""
    if plan.ready is not None:
        log(plan.ready.text)
        for left in plan.ready.left_out:
            log(f"left out: {left}")
    log(f"{len(plan.trials)} members in {plan.out}: {', '.join(trial.name for trial in plan.trials)}")
    if plan.halving is not None and plan.stops:
        stops = ", ".join(map(str, plan.stops))
        log(f"halving: after steps {stops} one of {plan.halving.factor} goes on, by validation loss")


def _trained(going: _Sweep) -> None:
    """All rungs, or the one rung there is."""
    stops: list[int | None] = [*going.plan.stops, None]
    for rung, stop_at in enumerate(stops):
        begun = [wave for wave in going.state.waves if wave.rung == rung]
        if not begun:
            begun = _new_waves(going, rung, stop_at)
            going.state.waves.extend(begun)
        for wave in begun:
            if not wave.begun:
                begun += _cut_again(going, wave)
            if not wave.done:
                _wave_trained(going, wave)
            if stop_at is None and not wave.scored:
                _score(going, wave)
            _take_off(going)
        if stop_at is not None:
            _drop(going, rung)


def _new_waves(going: _Sweep, rung: int, stop_at: int | None) -> list[Wave]:
    names = [trial.name for trial in going.state.alive()]
    told: dict[int, int] = {}

    def fits(rest: Sequence[str]) -> int:
        told[len(told)] = trials_that_fit(going.on, [going.recipe(name) for name in rest], going.plan.longest)
        return told[len(told) - 1]

    parts = waves(names, fits) if names else []
    if len(parts) > 1:
        going.log(
            f"{told[0]} of {len(names)} members fit into free memory beside the base, so they train in {len(parts)} "
            f"waves of {', '.join(str(len(part)) for part in parts)}"
        )
    return [
        Wave(
            rung=rung,
            stop_at=stop_at,
            names=part,
            why="all fit into memory" if len(parts) == 1 else f"{told[index]} fit into free memory beside the base",
            begun=False,
            done=False,
            scored=False,
        )
        for index, part in enumerate(parts)
    ]


def _cut_again(going: _Sweep, wave: Wave) -> list[Wave]:
    """Waves for the trials that a wave has no memory for any more, to be trained after all others."""
    names = wave.names
    fit = trials_that_fit(going.on, [going.recipe(name) for name in names], going.plan.longest)
    if fit >= len(names):
        return []
    rest = wave.model_copy(update={"names": names[fit:]})
    wave.names, wave.why = names[:fit], f"{fit} still fitted into free memory beside the base"
    going.state.waves.append(rest)
    going.log(f"{fit} of {', '.join(names)} still fit into free memory; the others train in a wave of their own")
    return [rest]


def _wave_trained(going: _Sweep, wave: Wave) -> None:
    """Train a wave's trials together, to the end or to where its rung compares them."""
    state, names = going.state, wave.names
    first = not any(other.done for other in state.waves) and not going.resumed
    for name in names:
        state.trial(name).state = TrialState.TRAINING
    wave.begun = True
    going.save()
    recipes = [going.recipe(name) for name in names]
    begun = (going.resumed or wave.rung > 0) and any(is_run(Path(recipe.output_dir)) for recipe in recipes)
    progress = going.progress() if going.progress else None
    runs, interrupted = [], None
    try:
        check_request(recipes, begun, going.overwrite and not begun)
        runs = train_held(
            recipes, resume=begun, overwrite=going.overwrite and not begun, progress=progress,
            log=going.log, stop_at=wave.stop_at, on=going.on,
        )  # fmt: skip
    except RunInterrupted as stopped:
        runs, interrupted = stopped.done, stopped
    except NonFiniteLossError as error:  # one alone; among several it leaves and the others go on
        if len(names) > 1:
            raise
        alone = state.trial(names[0])
        alone.state, alone.rung, alone.error = TrialState.DIVERGED, wave.rung, str(error)
        going.log(f"{alone.name} diverged: {error}")
    except RequestError:
        if first and not any(is_run(Path(recipe.output_dir)) for recipe in recipes):
            discard(going.plan.out)
        raise
    if _taken(going, wave, dict(zip(names, runs))):
        take_pass_cost(going.plan.out, state, wave)
        wave.done = True
    going.save()
    if interrupted is not None:
        raise interrupted


def _taken(going: _Sweep, wave: Wave, runs: dict[str, TrainedRun]) -> bool:
    """Write down how trials ended. False where they were interrupted before that."""
    interrupted = False
    for name, run in runs.items():
        trial = going.state.trial(name)
        trial.result = result_of(going.plan.out, trial, run.result)
        going.trained[name] = run.name
        if trial.result.stopped in ENDED:
            trial.state, trial.rung = TrialState(trial.result.stopped), wave.rung
        elif trial.result.stopped == "paused":  # validated at the rung, and not only there
            trial.rung = wave.rung
        else:
            interrupted = True
    return not interrupted


def _drop(going: _Sweep, rung: int) -> None:
    """The points that go on: the best of `factor` by the mean validation loss of their trials at the rung."""
    state, halving = going.state, going.plan.halving
    assert halving is not None
    if any(trial.left_at == rung for trial in state.trials):
        return  # dropped before the sweep was resumed
    losses: dict[str, list[float]] = {}
    for trial in state.trials:
        if trial.state is TrialState.LEFT:
            continue
        loss = trial.result.last_eval_loss if trial.result else None
        if loss is None or trial.state is TrialState.DIVERGED:  # a point of which one seed diverged is no candidate
            loss = inf
        losses.setdefault(trial.point, []).append(loss)
    ranked = sorted(losses, key=lambda point: sum(losses[point]) / len(losses[point]))
    kept = ranked[: max(1, ceil(len(ranked) / halving.factor))]
    gone = [trial for trial in state.alive() if trial.point not in kept]
    for trial in gone:
        trial.state, trial.left_at = TrialState.LEFT, rung
    going.save()
    on, off = (", ".join(trial.name for trial in trials) or "none" for trials in (state.alive(), gone))
    going.log(f"rung {rung + 1}, step {going.plan.stops[rung]}: {on} go on; {off} leave")


def _score(going: _Sweep, wave: Wave) -> None:
    """Exact answers and loss of a wave's trials; those that diverged and jobs without rows to score on have none."""
    todo = []
    for name in wave.names:
        trial, recipe = going.state.trial(name), going.recipe(name)
        measured = recipe.evaluation.data or (trial.result and trial.result.last_eval_loss is not None)
        if measured and trial.state in (TrialState.FINISHED, TrialState.EARLY_STOPPING):
            todo.append(Finished(name, Path(recipe.output_dir), recipe, _on_base(going, name)))
    if todo:
        seed = min(trial.recipe.training.seed for trial in going.plan.trials)
        for name, scored in evaluate_members(going.on.base, todo, seed, going.log).items():
            take_scores(going.state.trial(name), scored, going.recipe(name).evaluation.data is None)
    wave.scored = True
    going.save()


def _on_base(going: _Sweep, name: str) -> str:
    """The name on the base of a trial's adapter: it is there since it was trained, or is read from its folder."""
    if name not in going.trained:
        base = going.on.base
        saved = read_adapter(Path(going.recipe(name).output_dir) / ADAPTER)
        going.trained[name] = f"member{len(going.trained)}"
        load_adapter(going.on.adapters, going.trained[name], saved, base_id(base), False)
    return going.trained[name]


def _take_off(going: _Sweep) -> None:
    """Make room for the next wave."""
    for adapter in going.trained.values():
        going.on.adapters.remove(adapter)
    going.trained.clear()
