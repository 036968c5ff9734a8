"""The training of one call: adapters on a loaded base, their folders, the loop, and what each run leaves."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from topwork.adapters.config import LoraConfig
from topwork.adapters.methods.lora.parameters import told_of_experts
from topwork.adapters.targets import left_beside_text
from topwork.common.errors import RequestError
from topwork.common.files import recover_folder, write_json, write_text
from topwork.common.heap import trim_heap
from topwork.common.os_errors import explained
from topwork.common.telling import doing
from topwork.data.examples import Data
from topwork.data.source import StreamedRows, rows_of
from topwork.models.base import Base
from topwork.models.checkpointing import checkpoint_layers
from topwork.objectives.table import objective_of
from topwork.ops.threads import Threads, computing_threads
from topwork.plan.built import count_built
from topwork.plan.count import ParameterCount
from topwork.recipe.recipe import Recipe, recipe_yaml
from topwork.run.beforehand import Beforehand, tell_beforehand
from topwork.run.begin import begin_folder
from topwork.run.beginning_from import begin_from, origin_of, take_optimizer
from topwork.run.fit import passes_that_fit, trials_that_fit
from topwork.run.folder import ADAPTER, RECIPE, RESULT, TEMPLATE, read_json
from topwork.run.interrupted import RunInterrupted
from topwork.run.outcome import TrainedRun, figures, keep_adapter
from topwork.run.ownership import is_run, own
from topwork.run.provenance import PROVENANCE, provenance, record, refuse_other_inputs
from topwork.run.session import Session
from topwork.run.vocabulary import base_id, keep_tokenizer
from topwork.training.checkpoint import checkpoint_step, list_checkpoints
from topwork.training.interrupts import Interrupts
from topwork.training.loop import Loop, Outcome
from topwork.training.metrics import TENSORBOARD, WANDB_ID, MetricsLog, open_sinks
from topwork.training.passes import PassPlan
from topwork.training.progress import Progress
from topwork.training.start import Start, common_start
from topwork.training.trial import CHECKPOINTS, Place, Trial

Log = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What a call of `train_together` asks for beside its recipes."""

    resume: bool
    overwrite: bool
    progress: Callable[[str], Progress]
    log: Log
    stop_at: int | None


@dataclass(frozen=True)
class _Run:
    """One recipe with what belongs to it."""

    recipe: Recipe
    place: Place
    data: Data
    counted: ParameterCount

    @property
    def folder(self) -> Path:
        return self.place.run_dir


@dataclass(frozen=True)
class _Looped:
    """What the loop came to, for each run."""

    trials: Sequence[Trial]
    planned: Sequence[Beforehand]
    outcomes: Sequence[Outcome]
    tokens_per_pass: int


def trained(
    on: Session, recipes: Sequence[Recipe], loaded: Sequence[Data], names: Sequence[str], asked: Asked
) -> list[TrainedRun]:
    """Train an adapter for each recipe, by these names in the base. Raises RunInterrupted once a signal has stopped it
    and what each run leaves is written."""
    runs = _grafted(on, recipes, loaded, names, asked.log)
    trim_heap()
    plan = _passes(on.base, runs, asked)
    checkpoint_layers(on.base, plan.checkpointed_layers)
    start = _start(runs, asked.log) if asked.resume else Start()
    _write_beginnings(runs, on.base, plan.tokens_per_pass, asked.resume, asked.overwrite)
    with Interrupts() as interrupts, _threads(on.base, runs, asked.log) as threads:
        looped = _looped(on, runs, plan.tokens_per_pass, start, asked, interrupts, threads)
        plan = PassPlan(looped.tokens_per_pass, plan.checkpointed_layers)
        done = [
            _finished(run, on, plan, planned, outcome, len(runs))
            for run, planned, outcome in zip(runs, looped.planned, looped.outcomes)
        ]
    if interrupts.asked:
        steps = max(outcome.state.step for outcome in looped.outcomes)
        raise RunInterrupted(done, interrupts.number, f"interrupted after step {steps}")
    for trial in looped.trials:
        if isinstance(trial.rows, StreamedRows):
            for line in trial.rows.read.told():
                asked.log(line)
    return done


def _passes(base: Base, runs: Sequence[_Run], asked: Asked) -> PassPlan:
    """As the recipes ask, as the run was that goes on, or from free memory."""
    recipes = [run.recipe for run in runs]
    tokens = recipes[0].training.tokens_per_pass
    if tokens is None and asked.resume:
        tokens = read_json(runs[0].folder / PROVENANCE).get("tokens_per_pass")
    longest = max(run.data.longest(run.recipe.adapter.virtual_tokens) for run in runs)
    return passes_that_fit(recipes, longest, tokens, base, asked.log)


def _looped(
    on: Session, runs: Sequence[_Run], tokens_per_pass: int, start: Start, asked: Asked, interrupts: Interrupts,
    threads: Threads | None,
) -> _Looped:  # fmt: skip
    """The loop, from `start` to the end or to where it is stopped. Metrics are open as long as it runs."""
    shrinks = on.base.device.type == "cpu" and runs[0].recipe.training.tokens_per_pass is None
    with ExitStack() as logs:
        logs.enter_context(explained(started=True))
        trials = []
        for index, run in enumerate(runs):
            at = checkpoint_step(start.checkpoints[index]) if start.checkpoints else None
            metrics = logs.enter_context(_metrics(run, at, asked.log))
            trials.append(_trial(run, metrics, asked.progress(run.place.name), len(runs) > 1))
        smaller = _smaller_passes(runs, asked.log) if shrinks else None
        loop = Loop(on.base, on.adapters, trials, tokens_per_pass, smaller, threads)
        if start.checkpoints:
            loop.resume(start)
            asked.log(f"going on from {', '.join(str(path) for path in start.checkpoints)}")
        else:
            for trial, run in zip(trials, runs):
                take_optimizer(trial, run.recipe, asked.log)
        told = (lambda _: None) if start.checkpoints else asked.log
        planned = tell_beforehand(trials, [run.data for run in runs], told)
        if not start.checkpoints and any(run.data.eval for run in runs):
            doing(asked.log, "validating before the first step")
        outcomes = loop.run(asked.stop_at, interrupts)
    return _Looped(trials, planned, outcomes, loop.size.tokens)


def _threads(base: Base, runs: Sequence[_Run], log: Log) -> AbstractContextManager[Threads | None]:
    """As the recipes ask. On a card the host's threads compute nothing."""
    return computing_threads(runs[0].recipe.training.threads, log) if base.device.type == "cpu" else nullcontext()


def _grafted(
    on: Session, recipes: Sequence[Recipe], loaded: Sequence[Data], names: Sequence[str], log: Log
) -> list[_Run]:
    """A fresh adapter for each recipe. Raises RequestError where memory is too small."""
    base, several = on.base, len(recipes) > 1
    longest = max(data.longest(recipe.adapter.virtual_tokens) for recipe, data in zip(recipes, loaded))
    fit = trials_that_fit(on, recipes, longest)
    if fit < len(recipes):
        raise RequestError(
            f"{len(recipes)} adapters do not fit into memory together: the first {fit} do; train them in parts of "
            f"{fit}, or lower training.tokens_per_pass or adapter.r"
        )
    runs = []
    for recipe, name, data in zip(recipes, names, loaded):
        on.adapters.add(name, recipe.adapter, recipe.training.seed)
        _tell_left_out(on, recipe, log)
        counted = count_built(base.module, recipe.adapter)
        called = f"{base.name}, {name}" if several else base.name
        log(f"{called}: {counted.trainable:,} of {counted.total:,} parameters are trained ({counted.share:.2%})")
        if isinstance(recipe.adapter, LoraConfig):
            for line in told_of_experts(on.adapters.bare().seen, recipe.adapter):
                log(f"{called}: {line}")
        folder = Path(recipe.output_dir)
        place = Place(on.adapters, name, base_id(base), folder, partial(own, folder))
        begin_from(place, recipe, base, log)
        runs.append(_Run(recipe, place, data, counted))
    return runs


def _tell_left_out(on: Session, recipe: Recipe, log: Log) -> None:
    """Of a base that reads pictures too."""
    seen = on.adapters.bare().seen
    if left := left_beside_text(seen, recipe.adapter):
        log(
            f"{on.base.name}: the adapter goes into {seen.text}, and not into {', '.join(left)}, which text never meets"
        )


def _start(runs: Sequence[_Run], log: Log) -> Start:
    """Where all go on. Raises RequestError for one that was not begun with the others."""
    for run in runs:
        recover_folder(run.folder / ADAPTER)
    new = [run.folder for run in runs if not is_run(run.folder)]
    if new and any(list_checkpoints(run.folder / CHECKPOINTS) for run in runs):
        raise RequestError(
            f"{new[0]} was not begun with the others, which have checkpoints already; resume those without it, and "
            "begin it in a call of its own"
        )
    start = common_start([run.folder / CHECKPOINTS for run in runs], log)
    if not start.checkpoints:
        log(f"{', '.join(str(run.folder) for run in runs)}: stopped before the first checkpoint; going on from step 0")
    return start


def _write_beginnings(runs: Sequence[_Run], base: Base, tokens: int, resume: bool, overwrite: bool) -> None:
    """Each run's folder with its recipe, template and provenance; nothing is written where one is refused."""
    folders = [run.folder.name for run in runs] if len(runs) > 1 else []
    origins = [provenance(run.recipe, base, run.data, tokens, folders) | origin_of(run.recipe) for run in runs]
    if resume:
        for run, origin in zip(runs, origins):
            refuse_other_inputs(run.folder, origin)
    for run, origin in zip(runs, origins):
        begin_folder(run.folder, [TEMPLATE] if run.data.template.jinja else [], overwrite)
        write_text(run.folder / RECIPE, recipe_yaml(run.recipe))
        if run.data.template.jinja:
            write_text(run.folder / TEMPLATE, run.data.template.jinja)
        record(run.folder, origin, base)


def _smaller_passes(runs: Sequence[_Run], log: Log) -> Callable[[int, str], None]:
    """Told of passes that turn out to be too large: says so, and records what a resume will take."""

    def told(tokens: int, work: str) -> None:
        log(f"out of memory {work}: on with {tokens:,} tokens per pass; the result does not depend on it")
        for run in runs:
            write_json(run.folder / PROVENANCE, read_json(run.folder / PROVENANCE) | {"tokens_per_pass": tokens})

    return told


def _metrics(run: _Run, at: int | None, log: Log) -> MetricsLog:
    names, events = run.recipe.training.report_to, set((run.folder / TENSORBOARD).glob("*"))
    if "wandb" in names:
        own(run.folder, WANDB_ID)
    sinks = open_sinks(names, run.folder, run.recipe.model_dump(mode="json"), at)
    new = set((run.folder / TENSORBOARD).glob("*")) - events  # it names them itself
    own(run.folder, *(path.relative_to(run.folder).as_posix() for path in new))
    return MetricsLog(run.folder, at, sinks, log)


def _trial(run: _Run, metrics: MetricsLog, progress: Progress, several: bool) -> Trial:
    training = run.recipe.training
    keep = max(2, training.save_total_limit) if several else training.save_total_limit
    rows = rows_of(run.data.train, training.batch_size, training.seed)
    objective = objective_of(training.objective)
    return Trial(run.place, objective, training, rows, run.data.eval, metrics, progress, keep)


def _finished(
    run: _Run, on: Session, plan: PassPlan, planned: Beforehand, outcome: Outcome, members: int
) -> TrainedRun:  # fmt: skip
    keep_adapter(run.place, run.recipe.training, outcome, keep_tokenizer(on.base, run.data.template.jinja))
    result = figures(run.folder, run.recipe.training, on.base, run.data, run.counted, outcome)
    result |= {
        "plan": planned.as_json(),
        "warnings": [*result["warnings"], *planned.warnings()],
        "base_weights_bytes": on.weight_bytes,
        "base_held_as": on.held_as,
        "tokens_per_pass": plan.tokens_per_pass,
        "checkpointed_layers": plan.checkpointed_layers,
        "shared_with": members,
        **({"begun_from": run.recipe.adapter.init_from} if run.recipe.adapter.init_from else {}),
    }
    write_json(run.folder / RESULT, result)
    return TrainedRun(run.folder, result, run.place.name)
