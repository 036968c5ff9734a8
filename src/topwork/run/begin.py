"""A run's folder before training: may it be begun or gone on with, and is it clear of an earlier run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from topwork.adapters.sizes import trained_sizes
from topwork.common.errors import ModelError, RequestError
from topwork.common.files import clear_leftovers, recover_folder, recover_folders
from topwork.plan.base import structure_named
from topwork.recipe.recipe import Recipe
from topwork.run.folder import ADAPTER, EVALUATION, RECIPE, RESULT, TEMPLATE, TRIAL, check_place, read_recipe
from topwork.run.ownership import (
    RUN,
    begin_list,
    delete_owned,
    foreign_in,
    is_listed,
    is_old_run,
    is_run,
    nothing_begun,
    own,
    owned,
    refuse_other_list,
)
from topwork.run.provenance import PROVENANCE
from topwork.training.checkpoint import list_checkpoints
from topwork.training.metrics import METRICS, TENSORBOARD, WANDB_ID, check_sinks
from topwork.training.trial import CHECKPOINTS

FREE_TO_CHANGE = {
    "output_dir", "training.tokens_per_pass", "training.activation_checkpointing", "training.report_to",
    "training.logging_steps", "training.save_total_limit", "training.save_steps", "training.threads", "model.device",
    "model.model_name_or_path", "model.tokenizer_name_or_path", "data.train", "data.eval", "data.chat_template",
}  # fmt: skip
"""What may differ when a run is resumed; anything else would make it another run. Files may have moved: whether they
are the same is told by their hashes (`run/provenance.py`)."""

FOUND_ON_THE_WAY = ("data.too_long", "data.on_bad_row")
"""Streamed rows that are refused are met in the midst of a run. It had none before, so it may go on without them."""

A_RUNS = (RECIPE, PROVENANCE, METRICS, RESULT, ADAPTER, TEMPLATE, EVALUATION, TRIAL, "merge.json", WANDB_ID)
"""What a run or a verb finds in a run's folder and takes for the run's own; checkpoints beside."""

PATTERNS = ("adapter.rank_pattern", "adapter.alpha_pattern")
"""Options whose keys have an order: of several that match a module the first counts."""

SHARED = ("training.tokens_per_pass", "training.activation_checkpointing", "training.threads")
"""Options that are the pass's, beside the sections `model` and `quantization`."""


def check_shared(recipes: Sequence[Recipe]) -> None:
    """Raises RequestError where recipes cannot train in one pass: no recipe, one folder twice, or another base."""
    if not recipes:
        raise RequestError("no recipe was given; give at least one")
    seen: dict[Path, str] = {}
    for recipe in recipes:
        place = Path(recipe.output_dir).resolve()
        if place in seen:
            raise RequestError(f"two runs have the output_dir {recipe.output_dir}; give each a folder of its own")
        seen[place] = recipe.output_dir
    first = _pass_options(recipes[0])
    for recipe in recipes[1:]:
        own = _pass_options(recipe)
        told = [
            f"{key} is {first.get(key)!r} in the first and {own.get(key)!r} in the second"
            for key in sorted(first.keys() | own.keys())
            if first.get(key) != own.get(key)
        ]
        if told:
            raise RequestError(
                f"{recipes[0].output_dir} and {recipe.output_dir} cannot train in one pass: {'; '.join(told)}. Give "
                "both the same, or train them apart"
            )


def check_targets(recipes: Sequence[Recipe]) -> None:
    """Raises AdapterError where an adapter does not fit the base that the first recipe names, told by its config alone.
    A base that cannot be built so is for its loading to speak of."""
    try:
        base = structure_named(recipes[0].model)
    except ModelError:
        return
    for recipe in recipes:
        trained_sizes(base, recipe.adapter)


def check_request(recipes: Sequence[Recipe], resume: bool, overwrite: bool) -> None:
    """What can be told before a folder is looked into. Raises RequestError, and where `resume` finds no run."""
    if resume and overwrite:
        raise RequestError("--resume goes on with a run and --overwrite deletes it; give one of the two")
    for recipe in recipes:
        check_sinks(recipe.training.report_to)
        check_place(Path(recipe.output_dir), "output_dir")
    folders = [Path(recipe.output_dir) for recipe in recipes]
    if resume and not any(is_run(folder) for folder in folders):
        strange = next((folder for folder in folders if holds_others(folder)), None)
        raise nothing_begun(folders[0]) if strange is None else _other_files(strange)


def check_folder(recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """Raises RequestError where the recipe's output_dir holds what a run must not touch; nothing is written but what a
    killed process left half done. The folder is held by this process (`common/locks.py`)."""
    folder = Path(recipe.output_dir)
    clear_leftovers(folder)
    if not is_run(folder):
        if holds_others(folder):
            raise _other_files(folder)
    elif resume:
        refuse_other_list(folder)
        _refuse_another_recipe(folder, recipe)
        _refuse_foreign_checkpoints(folder)
    elif overwrite:
        check_replaceable(folder)
    else:
        raise RequestError(
            f"output_dir {folder} holds a run already; go on with it by --resume, replace it by --overwrite, or name "
            "another output_dir"
        )


def check_replaceable(folder: Path) -> None:
    """Raises RequestError where not all that the next run would take for its own may be deleted; nothing is deleted."""
    if not is_listed(folder):
        raise RequestError(
            f"the run in {folder} has no list of its files ({RUN}): an earlier Topwork wrote it, or the list is "
            "damaged, so nothing in there is deleted. Move the folder away, name another output_dir, or go on with it "
            "by --resume"
        )
    recover_folder(folder / ADAPTER)
    recover_folders(folder / CHECKPOINTS)
    known = owned(folder)
    kept = [name for name in _a_runs_names(folder) if name not in known]
    for name in known:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            kept += [f"{name}/{file}" for file in foreign_in(folder, name)]
    if kept:
        raise _not_the_runs(
            folder, kept, "the new run would take it for its own, and --overwrite deletes only what is the run's"
        )


def clear(folder: Path) -> None:
    """Take an earlier run out of its folder. Its recipe stays until it is replaced, so that a kill loses none."""
    delete_owned(folder, but=(RECIPE,))


def begin_folder(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """Make the folder a run's, clear of the one before where that is overwritten, and write down what will be its own
    there, `names` among it. A run that has no list yet gets one of what it wrote."""
    if overwrite:
        clear(folder)
    known = {RECIPE, PROVENANCE, METRICS, RESULT, ADAPTER, *names}
    if is_listed(folder) and not overwrite:
        own(folder, *known)
    else:
        begin_list(folder, *known, *(_a_runs_names(folder) if is_old_run(folder) else ()))


def _a_runs_names(folder: Path) -> list[str]:
    """What is here that a run takes for its own, whoever wrote it."""
    names = [name for name in A_RUNS if (folder / name).exists()]
    names += [f"{CHECKPOINTS}/{path.name}" for path in list_checkpoints(folder / CHECKPOINTS)]
    return names + [
        path.relative_to(folder).as_posix() for path in (folder / TENSORBOARD).glob("events.out.tfevents.*")
    ]


def _refuse_another_recipe(folder: Path, recipe: Recipe) -> None:
    if not (folder / RECIPE).is_file():
        return  # killed before it was written
    before, now = (flat(r.model_dump(mode="json")) for r in (read_recipe(folder), recipe))
    changed = [
        key for key in sorted(before.keys() | now.keys())
        if _meant(key, before) != _meant(key, now)
        and key not in FREE_TO_CHANGE and not key.startswith("evaluation.")
        and not (key in FOUND_ON_THE_WAY and now.get("data.streaming") and before.get(key) == "refuse")
    ]  # fmt: skip
    if changed:
        told = "; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed[:5])
        raise RequestError(f"{folder} was begun with another recipe ({told}). Resume with the same, or start anew")


def _meant(key: str, values: dict[str, Any]) -> Any:
    """An option, with its order where it has one."""
    value = values.get(key)
    return list(value.items()) if key in PATTERNS and isinstance(value, dict) else value


def _refuse_foreign_checkpoints(folder: Path) -> None:
    """A run deletes its old checkpoints, and goes on from the newest: of its own."""
    if is_listed(folder):
        found = [f"{CHECKPOINTS}/{path.name}" for path in list_checkpoints(folder / CHECKPOINTS)]
        if kept := [name for name in found if name not in owned(folder)]:
            raise _not_the_runs(folder, kept, "the run would go on from it, or delete it")


def holds_others(folder: Path) -> bool:
    """Whether it holds anything that is not hidden."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def _other_files(folder: Path) -> RequestError:
    return RequestError(f"output_dir {folder} holds other files and no run; give an empty or a new folder")


def _not_the_runs(folder: Path, names: Sequence[str], why: str) -> RequestError:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return RequestError(
        f"{folder} holds what its run has not written ({', '.join(names[:5])}{more}): {why}. Nothing was deleted; move "
        "it away"
    )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by dotted name; a section's own maps and lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and not prefix:
            found |= flat(value, f"{key}.")
        else:
            found[prefix + key] = value
    return found


def _pass_options(recipe: Recipe) -> dict[str, Any]:
    values = flat(recipe.model_dump(mode="json"))
    return {key: value for key, value in values.items() if key in SHARED or key.startswith(("model.", "quantization."))}
