"""`adapter.init_from` where the base is: a fresh adapter takes the weights of another, and the run says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from topwork.adapters.config import AdapterConfig
from topwork.adapters.foreign import adapter_folder
from topwork.adapters.peft_format import BaseId, SavedAdapter, check_base, fill_from, read_adapter
from topwork.adapters.ranks import refuse_other_ranks
from topwork.adapters.settling import begun, modules_of, settled
from topwork.common.errors import AdapterError, RequestError
from topwork.common.files import sha256_file
from topwork.data.config import DataConfig
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.quantization.linear import packed_kinds
from topwork.recipe.beginning import chosen_otherwise, with_beginning
from topwork.recipe.recipe import Recipe
from topwork.run.chosen import Chosen, choose
from topwork.run.folder import RECIPE, TEMPLATE, read_json, read_recipe
from topwork.run.given import run_of
from topwork.run.provenance import PROVENANCE
from topwork.training.checkpoint import ADAPTER as INNER
from topwork.training.checkpoint import list_checkpoints, load_optimizer
from topwork.training.trial import CHECKPOINTS, Place, Trial

TENSORS = "adapter_model.safetensors"


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with all that `adapter.init_from` decides written out, as `load_recipe` gives it, where it was made in
    Python. Raises RecipeError and AdapterError."""
    if recipe.adapter.init_from is None:
        return recipe
    if _takes_optimizer(recipe) and Path(recipe.adapter.init_from).exists():
        optimizer_of(Path(recipe.adapter.init_from))  # told before a base is read
    given = {name: getattr(recipe, name).model_dump(exclude_unset=True) for name in ("adapter", "data", "model")}
    found = with_beginning({**given, "output_dir": recipe.output_dir}, Path())
    update = {
        "adapter": AdapterConfig(**found["adapter"]),
        "data": DataConfig(**found["data"]),
        "model": ModelConfig(**found["model"]),
    }
    return recipe.model_copy(update=update)


def begin_from(place: Place, recipe: Recipe, base: Base, log: Callable[[str], None]) -> None:
    """Give a fresh adapter the weights that its recipe names; for a run that is gone on with, those of its checkpoint
    will count. Raises AdapterError where they are another base's, or do not fit."""
    named = recipe.adapter.init_from
    if named is None or _is_gone(Path(named), place.run_dir):
        return
    start = start_of(Path(named), log)
    _check_base(start.saved, place.base_id, log)
    bare = place.adapters.bare()
    for note in (*start.saved.notes, *settled(bare.seen, recipe.adapter, modules_of(start.saved.tensors))[1]):
        log(f"note: {named}: {note}")
    try:
        if not recipe.adapter.keeps_beginnings:  # whose file has twice the rank
            refuse_other_ranks(bare.seen, begun(bare.seen, recipe.adapter), start.saved.tensors, str(start.folder))
        fill_from(start.saved, place.adapters.parts(place.name), bare)
    except AdapterError as error:
        otherwise = chosen_otherwise(recipe.adapter, Path(named))
        raise AdapterError(f"adapter.init_from {named}{otherwise}: {error}") from error
    trained = sum(parameter.numel() for parameter in place.adapters.parameters(place.name).values())
    log(
        f"{place.name} begins from {start.folder}: its {trained:,} parameters, "
        f"{'the optimizer taken along' if _takes_optimizer(recipe) else 'a fresh optimizer'}; the "
        "validation before the first step is of the base with it"
    )
    _tell_differences(recipe, Path(named), base, log)


def start_of(place: Path, log: Callable[[str], None]) -> Chosen:
    """The adapter to begin from: a run's, or its newest whole checkpoint's where it has none yet; a checkpoint's; or
    one alone. Raises RequestError where there is none, AdapterError and CheckpointError where it cannot be read."""
    run, step = run_of(place)
    if (run / RECIPE).is_file():
        return choose(run, read_recipe(run), step, log)
    folder = adapter_folder(place)
    return Chosen(folder, read_adapter(folder))


def take_optimizer(trial: Trial, recipe: Recipe, log: Callable[[str], None]) -> None:
    """Give a trial that has not begun the moments and step counts of the run that it begins from, where its recipe says
    so. Raises RequestError where that has none of them, CheckpointError where they are of another optimizer."""
    if _takes_optimizer(recipe):
        checkpoint = optimizer_of(Path(str(recipe.adapter.init_from)))
        step = load_optimizer(checkpoint, trial.optimizer, trial.names)
        log(f"{trial.name}: its optimizer goes on from step {step} of {checkpoint}, its learning rate begins anew")


def optimizer_of(place: Path) -> Path:
    """The checkpoint that holds the optimizer of the adapter at a place: that checkpoint, or of a finished adapter the
    one with the same weights. Raises RequestError where there is none."""
    run, _ = run_of(place)
    if not (run / RECIPE).is_file():
        raise RequestError(
            f"training.init_optimizer: {place} lies in no run, and an adapter's own folder holds no optimizer (what "
            "other tools pickle beside it is not read); leave training.init_optimizer at fresh"
        )
    start = start_of(place, lambda _: None)
    if start.checkpoint is not None:
        return start.folder.parent
    wanted = sha256_file(start.folder / TENSORS)
    for checkpoint in reversed(list_checkpoints(run / CHECKPOINTS)):
        tensors = checkpoint / INNER / TENSORS
        if tensors.is_file() and sha256_file(tensors) == wanted:
            return checkpoint
    raise RequestError(
        f"training.init_optimizer is taken, and no checkpoint of {run} holds the optimizer of its finished adapter "
        "(it may have been deleted); begin from one that is there, RUN/checkpoints/step-…, or leave "
        "training.init_optimizer at fresh"
    )


def _takes_optimizer(recipe: Recipe) -> bool:
    return recipe.training.init_optimizer == "taken" and recipe.adapter.init_from is not None


def origin_of(recipe: Recipe) -> dict[str, Any]:
    """What provenance.json says of it: its place, and the SHA-256 of the file with its tensors."""
    named = recipe.adapter.init_from
    if named is None or not Path(named).exists():
        return {}
    start = start_of(Path(named), lambda _: None)
    step = {} if start.checkpoint is None else {"checkpoint": start.checkpoint}
    taken = {"optimizer_of": optimizer_of(Path(named)).name} if _takes_optimizer(recipe) else {}
    return {"begun_from": {"path": named, "sha256": sha256_file(start.folder / TENSORS), **step, **taken}}


def _is_gone(named: Path, run_dir: Path) -> bool:
    if named.exists():
        return False
    if list_checkpoints(run_dir / CHECKPOINTS):
        return True
    raise AdapterError(
        f"adapter.init_from {named} is not there any more, and {run_dir} has no checkpoint to go on from; bring it "
        "back, or name another place to begin from"
    )


def _check_base(saved: SavedAdapter, base: BaseId, log: Callable[[str], None]) -> None:
    try:
        warning = check_base(saved, base)
    except AdapterError as error:
        told = str(error).partition(". Load it onto")[0]
        raise AdapterError(
            f"adapter.init_from: {told}. Train on over the base that it was trained on (model.model_name_or_path)"
        ) from error
    if warning:
        log(f"warning: {warning}")


def _tell_differences(recipe: Recipe, named: Path, base: Base, log: Callable[[str], None]) -> None:
    run, _ = run_of(named)
    if not (run / RECIPE).is_file():
        return
    if recipe.data.chat_template == str(run.resolve() / TEMPLATE):
        log(f"chat template: the one that {run} was trained with; data.chat_template names another")
    held = read_json(run / PROVENANCE).get("base", {}).get("held_as")
    if held is not None and held != packed_kinds(base.module):
        log(
            f"warning: {run} was trained on the base held as {held or 'dense'}, which is held as "
            f"{packed_kinds(base.module) or 'dense'} here; set quantization as it was there to begin where it ended"
        )
