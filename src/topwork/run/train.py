"""`topwork train`: recipes on one base, trained in the same passes, one or several. Where all parts meet."""

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from topwork.adapters.graft import Adapters, is_free
from topwork.common.errors import ModelError, RequestError
from topwork.common.locks import locked
from topwork.common.memory import memory_for
from topwork.common.os_errors import explained
from topwork.common.streams import sure
from topwork.common.telling import doing
from topwork.data.config import told
from topwork.data.examples import Data, load_data
from topwork.data.parts import look_for
from topwork.models.tokenizer import open_tokenizer
from topwork.models.vocabulary import rows_of
from topwork.plan.base import structure_named
from topwork.recipe.recipe import Recipe
from topwork.run.begin import check_folder, check_request, check_shared, check_targets
from topwork.run.beginning_from import resolved
from topwork.run.divergence import record_divergence
from topwork.run.fit import refuse_small_memory
from topwork.run.interrupted import RunInterrupted
from topwork.run.lint import quick_line
from topwork.run.outcome import TrainedRun
from topwork.run.session import Session, open_session
from topwork.run.training import Asked, trained
from topwork.run.vocabulary import check_ids, with_new_tokens
from topwork.run.which import which_recipe
from topwork.training.progress import Progress, Silent

Log = Callable[[str], None]
LESS = (
    "what was saved is kept, so go on with --resume; training.tokens_per_pass, adapter.r and the number of adapters "
    "decide how much is needed"
)
"""Beside what a pass takes, which `training/smaller.py` tells of."""


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

    The recipes share `model`, `quantization`, `training.tokens_per_pass`, `training.activation_checkpointing` and
    `training.threads`.

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
    recipes = with_new_tokens(recipes, log)
    for recipe in recipes:
        check_folder(recipe, resume, overwrite)
    loaded, held = _prepared(recipes, on, log)
    names = _names(recipes, held.adapters)
    try:
        with memory_for("training", LESS):
            asked = Asked(resume, overwrite, progress or (lambda _: Silent()), log, stop_at)
            return trained(held, recipes, loaded, names, asked)
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
        loaded = _load_data(recipes, on.base.tokenizer, on.base.context_length, log)
        check_ids(loaded, on.base.vocabulary, on.base.tokenizer, on.base.name)
        return loaded, on
    check_targets(recipes)
    tokenizer, context_length = open_tokenizer(recipes[0].model, log)
    loaded = _load_data(recipes, tokenizer, context_length, log)
    _check_ids(recipes[0], loaded, tokenizer)
    longest = max(data.longest(recipe.adapter.virtual_tokens) for recipe, data in zip(recipes, loaded))
    refuse_small_memory(recipes[0], longest, log)
    return loaded, open_session(recipes[0], log, tokenizer)


def _check_ids(recipe: Recipe, loaded: Sequence[Data], tokenizer: PreTrainedTokenizerBase) -> None:
    """Before the weights are read, by the config alone; where that tells nothing, its loading will."""
    try:
        rows = rows_of(structure_named(recipe.model))
    except ModelError:
        return
    check_ids(loaded, rows, tokenizer, recipe.model.model_name_or_path)


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


def _names(recipes: Sequence[Recipe], adapters: Adapters) -> list[str]:
    """A name in the base for each recipe, from its folder's."""
    names: list[str] = []
    for recipe in recipes:
        stem = Path(recipe.output_dir).resolve().name.replace(".", "_") or "run"
        tries = [stem, *(f"{stem}-{number}" for number in range(2, 2 + len(recipes) + len(adapters.configs) + 1))]
        taken = {*names, *adapters.configs}
        names.append(next(name for name in tries if name not in taken and is_free(name)))
    return names
