"""A run's folder before training: may it be begun or gone on with, and is it clear of an earlier run."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from topwork.common.errors import ModelError, RequestError
from topwork.common.files import clear_leftovers
from topwork.plan.count import base_skeleton, count_adapter
from topwork.recipe.recipe import Recipe
from topwork.run.folder import ADAPTER, EVALUATION, RECIPE, RESULT, TEMPLATE, TRIAL, check_place, read_recipe
from topwork.run.provenance import PROVENANCE
from topwork.training.metrics import METRICS, check_sinks
from topwork.training.trial import CHECKPOINTS

FREE_TO_CHANGE = {
    "output_dir", "training.tokens_per_pass", "training.activation_checkpointing", "training.report_to",
    "training.logging_steps", "training.save_total_limit", "training.save_steps", "model.device",
    "model.model_name_or_path", "data.train", "data.eval", "data.chat_template",
}  # fmt: skip
"""What may differ when a run is resumed; anything else would make it another run. Files may have moved: whether they
are the same is told by their hashes (`run/provenance.py`)."""

FOUND_ON_THE_WAY = ("data.too_long", "data.on_bad_row")
"""Streamed rows that are refused are met in the midst of a run. It had none before, so it may go on without them."""

SHARED = ("training.tokens_per_pass", "training.activation_checkpointing")
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
        shape = base_skeleton(recipes[0].model)
    except ModelError:
        return
    for recipe in recipes:
        count_adapter(shape, recipe.adapter)


def check_folder(recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """Raises RequestError where the recipe's output_dir holds what a run must not touch; nothing is written."""
    check_sinks(recipe.training.report_to)
    folder = Path(recipe.output_dir)
    if resume and overwrite:
        raise RequestError("--resume goes on with a run and --overwrite deletes it; give one of the two")
    check_place(folder, "output_dir")
    clear_leftovers(folder)
    if not (folder / RECIPE).exists():
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise RequestError(f"output_dir {folder} holds other files; give an empty or a new folder")
        return
    if resume:
        before, now = (flat(r.model_dump(mode="json")) for r in (read_recipe(folder), recipe))
        changed = [
            key for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in FREE_TO_CHANGE and not key.startswith("evaluation.")
            and not (key in FOUND_ON_THE_WAY and now.get("data.streaming") and before.get(key) == "refuse")
        ]  # fmt: skip
        if changed:
            told = "; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed[:5])
            raise RequestError(f"{folder} was begun with another recipe ({told}). Resume with the same, or start anew")
    elif not overwrite:
        raise RequestError(
            f"output_dir {folder} holds a run already; go on with it by --resume, replace it by --overwrite, or name "
            "another output_dir"
        )


def clear(folder: Path) -> None:
    """Take an earlier run out of its folder."""
    for stale in (CHECKPOINTS, ADAPTER, "report", "tensorboard"):
        shutil.rmtree(folder / stale, ignore_errors=True)
    for stale in (METRICS, RESULT, EVALUATION, TRIAL, "merge.json", PROVENANCE, TEMPLATE, "wandb_id"):
        (folder / stale).unlink(missing_ok=True)


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
