"""`topwork train`: recipes on one base, trained in the same passes, one or several. Where all parts meet."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from topwork.adapters.graft import Adapters, is_free
from topwork.adapters.peft_format import BaseId
from topwork.common.errors import RequestError
from topwork.common.files import recover_folder, write_json, write_text
from topwork.common.locks import locked
from topwork.common.memory import memory_for
from topwork.common.os_errors import explained
from topwork.common.streams import sure
from topwork.common.telling import doing
from topwork.data.config import told
from topwork.data.examples import Data, load_data
from topwork.data.parts import look_for
from topwork.data.source import StreamedRows, rows_of
from topwork.models.base import Base
from topwork.models.checkpointing import checkpoint_layers
from topwork.models.tokenizer import open_tokenizer
from topwork.objectives.table import objective_of
from topwork.plan.count import ParameterCount, count_adapter
from topwork.recipe.recipe import Recipe, recipe_yaml
from topwork.run.beforehand import Beforehand, tell_beforehand
from topwork.run.begin import begin_folder, check_folder, check_request, check_shared, check_targets
from topwork.run.beginning_from import begin_from, origin_of, resolved
from topwork.run.divergence import record_divergence
from topwork.run.fit import passes_that_fit, refuse_small_memory, trials_that_fit
from topwork.run.folder import ADAPTER, RECIPE, RESULT, TEMPLATE, read_json
from topwork.run.interrupted import RunInterrupted
from topwork.run.lint import quick_line
from topwork.run.outcome import TrainedRun, figures, keep_adapter
from topwork.run.ownership import is_run, own
from topwork.run.provenance import PROVENANCE, provenance, record, refuse_other_inputs
from topwork.run.session import Session, open_session
from topwork.run.which import which_recipe
from topwork.training.checkpoint import checkpoint_step, list_checkpoints
from topwork.training.interrupts import Interrupts
from topwork.training.loop import Loop, Outcome
from topwork.training.metrics import TENSORBOARD, WANDB_ID, MetricsLog, open_sinks
from topwork.training.passes import PassPlan
from topwork.training.progress import Progress, Silent
from topwork.training.start import Start, common_start
from topwork.training.trial import CHECKPOINTS, Place, Trial

Log = Callable[[str], None]
LESS = (
    "what was saved is kept, so go on with --resume; training.tokens_per_pass, adapter.r and the number of adapters "
    "decide how much is needed"
)
"""Beside what a pass takes, which `training/smaller.py` tells of."""


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


def train(
    recipe: Recipe | Path | str,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    log: Callable[[str], None] = print,
) -> TrainedRun:
    """Train the adapter that a recipe describes; the result is in `output_dir`, and in the folder that is given where
    that is a run's, or the recipe.yaml in one.

    `resume` goes on with a run from its newest whole checkpoint. Raises RequestError where something is wrong with the
    request (nothing is written then): no run to resume, or a folder that another process trains in, too. Raises
    RunError where the run fails, and RunInterrupted, which is a KeyboardInterrupt, once Ctrl-C or another signal has
    stopped it and a checkpoint is saved; in a thread other than the main one no signal does.
    """
    recipe = recipe if isinstance(recipe, Recipe) else which_recipe(Path(recipe), overrides, resume)
    one = progress or Silent()
    try:
        return train_together([recipe], resume, overwrite, lambda _: one, log)[0]
    except RunInterrupted as stopped:
        stopped.done = stopped.done[0]
        raise


@explained()
def train_together(
    recipes: Sequence[Recipe],
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], Progress] | None = None,
    log: Log = print,
    stop_at: int | None = None,
    on: Session | None = None,
) -> list[TrainedRun]:
    """Train the adapters that recipes describe in the same passes over one base; each result is in its `output_dir`.

    The recipes share `model`, `quantization`, `training.tokens_per_pass` and `training.activation_checkpointing`.

    resume    go on from the newest round that all have a checkpoint of, at step 0 where they were stopped before the
              first; a part of the recipes that were begun together may go on without the others
    progress  gives the Progress of a trial by its name
    stop_at   end the call after so many optimizer steps of each ("paused"): validated, with a checkpoint and an adapter
              of that step; a later call with `resume` goes on, by the learning rates of the whole plan
    on        a base that is loaded already; the adapters then stay on it by `TrainedRun.name`, for the caller to remove

    Raises RequestError where something is wrong with the request (nothing is written then), RunError where training
    fails, and NonFiniteLossError where there is one recipe and it diverges; of several that one is "diverged".
    RunInterrupted as `train` does.
    """
    recipes, log = [resolved(recipe) for recipe in recipes], sure(log)
    check_shared(recipes)
    if stop_at is not None and stop_at < 1:
        raise RequestError(f"stop_at is {stop_at}; give at least 1 step, or leave it out")
    check_request(recipes, resume, overwrite)
    with locked(Path(recipe.output_dir) for recipe in recipes):
        return train_held(recipes, resume, overwrite, progress, log, stop_at, on)


def train_held(
    recipes: Sequence[Recipe], resume: bool, overwrite: bool, progress: Callable[[str], Progress] | None, log: Log,
    stop_at: int | None, on: Session | None,
) -> list[TrainedRun]:  # fmt: skip
    """`train_together` in folders that this process holds already."""
    for recipe in recipes:
        check_folder(recipe, resume, overwrite)
    loaded, held = _prepared(recipes, on, log)
    names = _names(recipes, held.adapters)
    try:
        with memory_for("training", LESS):
            return _trained(
                held, recipes, loaded, names, resume, overwrite, progress or (lambda _: Silent()), log, stop_at
            )
    except BaseException as error:
        record_divergence(recipes, error)
        for name in names:
            if name in held.adapters.configs:
                held.adapters.remove(name)
        raise


def _prepared(recipes: Sequence[Recipe], on: Session | None, log: Log) -> tuple[list[Data], Session]:
    """The recipes' data and their base, in this order: what is wrong with a target or with rows is told before any
    weight is read."""
    if on is not None:
        on.check(recipes[0])
        return _load_data(recipes, on.base.tokenizer, on.base.context_length, log), on
    check_targets(recipes)
    tokenizer, context_length = open_tokenizer(recipes[0].model, log)
    loaded = _load_data(recipes, tokenizer, context_length, log)
    longest = max(data.longest(recipe.adapter.virtual_tokens) for recipe, data in zip(recipes, loaded))
    refuse_small_memory(recipes[0], longest)
    return loaded, open_session(recipes[0], log, tokenizer)


def _trained(
    on: Session, recipes: Sequence[Recipe], loaded: Sequence[Data], names: Sequence[str], resume: bool,
    overwrite: bool, progress: Callable[[str], Progress], log: Log, stop_at: int | None,
) -> list[TrainedRun]:  # fmt: skip
    base = on.base
    runs = _grafted(on, recipes, loaded, names, log)
    asked = recipes[0].training.tokens_per_pass
    if asked is None and resume:
        asked = read_json(runs[0].folder / PROVENANCE).get("tokens_per_pass")
    longest = max(run.data.longest(run.recipe.adapter.virtual_tokens) for run in runs)
    plan = passes_that_fit(recipes, [run.counted for run in runs], longest, asked, base, log)
    checkpoint_layers(base, plan.checkpointed_layers)
    start = _start(runs, log) if resume else Start()
    _write_beginnings(runs, base, plan.tokens_per_pass, resume, overwrite)
    shrinks = base.device.type == "cpu" and recipes[0].training.tokens_per_pass is None
    told_smaller = _smaller_passes(runs, log) if shrinks else None
    with Interrupts() as interrupts:
        with ExitStack() as logs:
            logs.enter_context(explained(started=True))
            trials = []
            for index, run in enumerate(runs):
                at = checkpoint_step(start.checkpoints[index]) if start.checkpoints else None
                metrics = logs.enter_context(_metrics(run, at, log))
                trials.append(_trial(run, metrics, progress(run.place.name), len(runs) > 1))
            loop = Loop(base, on.adapters, trials, plan.tokens_per_pass, told_smaller)
            if start.checkpoints:
                loop.resume(start)
                log(f"going on from {', '.join(str(path) for path in start.checkpoints)}")
            planned = tell_beforehand(
                trials, [run.data for run in runs], (lambda _: None) if start.checkpoints else log
            )
            if not start.checkpoints and any(run.data.eval for run in runs):
                doing(log, "validating before the first step")
            outcomes = loop.run(stop_at, interrupts)
        plan = replace(plan, tokens_per_pass=loop.size.tokens)
        done = [_finished(run, on, plan, own, out, len(runs)) for run, own, out in zip(runs, planned, outcomes)]
    if interrupts.asked:
        steps = max(outcome.state.step for outcome in outcomes)
        raise RunInterrupted(done, interrupts.number, f"interrupted after step {steps}")
    for trial in trials:
        if isinstance(trial.rows, StreamedRows):
            for line in trial.rows.read.told():
                log(line)
    return done


def _grafted(
    on: Session, recipes: Sequence[Recipe], loaded: Sequence[Data], names: Sequence[str], log: Log
) -> list[_Run]:
    """A fresh adapter for each recipe. Raises RequestError where memory is too small."""
    base, several = on.base, len(recipes) > 1
    fit = trials_that_fit(on, recipes)
    if fit < len(recipes):
        raise RequestError(
            f"{len(recipes)} adapters do not fit into memory together: the first {fit} do; train them in parts of "
            f"{fit}, or lower training.tokens_per_pass or adapter.r"
        )
    runs = []
    for recipe, name, data in zip(recipes, names, loaded):
        on.adapters.add(name, recipe.adapter, recipe.training.seed)
        counted = count_adapter(base.module, recipe.adapter)
        called = f"{base.name}, {name}" if several else base.name
        log(f"{called}: {counted.trainable:,} of {counted.total:,} parameters are trained ({counted.share:.2%})")
        folder = Path(recipe.output_dir)
        place = Place(on.adapters, name, BaseId(base.name, base.fingerprint), folder, partial(own, folder))
        begin_from(place, recipe, base, log)
        runs.append(_Run(recipe, place, data, counted))
    return runs


@memory_for("reading the rows", "data.streaming: true reads them as they are needed, and data.max_rows fewer of them")
def _load_data(
    recipes: Sequence[Recipe], tokenizer: PreTrainedTokenizerBase, context_length: int, log: Log
) -> list[Data]:
    """Data that several recipes name alike are loaded once; the seed counts where it decides which rows they are. What
    evaluation will read is looked for, so that it is not found missing after the training."""
    for recipe in recipes:
        if recipe.evaluation.data is not None:
            look_for(recipe.data, recipe.evaluation.data)
    known: dict[tuple[str, int | None, int], Data] = {}
    found = []
    for recipe in recipes:
        config, seed = recipe.data, recipe.training.seed
        room = context_length - recipe.adapter.virtual_tokens
        key = (config.model_dump_json(), seed if config.seed_decides else None, min(room, config.max_length))
        if key not in known:
            doing(log, f"reading the rows: {told(config.train)}")
            known[key] = load_data(config, tokenizer, room, seed, log, False)  # tell_beforehand has the counts
            if not config.streaming:
                log(quick_line(recipe, known[key], tokenizer, room))
        found.append(known[key])
    return found


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
    keep_adapter(run.place, run.recipe.training, outcome)
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


def _names(recipes: Sequence[Recipe], adapters: Adapters) -> list[str]:
    """A name in the base for each recipe, from its folder's."""
    names: list[str] = []
    for recipe in recipes:
        stem = Path(recipe.output_dir).resolve().name.replace(".", "_") or "run"
        tries = [stem, *(f"{stem}-{number}" for number in range(2, 2 + len(recipes) + len(adapters.configs) + 1))]
        taken = {*names, *adapters.configs}
        names.append(next(name for name in tries if name not in taken and is_free(name)))
    return names
