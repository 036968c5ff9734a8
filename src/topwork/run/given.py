"""An adapter as a command is given it: a run's folder, or any PEFT folder or Hub id together with its base."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from topwork.adapters.foreign import adapter_folder
from topwork.adapters.peft_format import SavedAdapter, read_adapter
from topwork.common.errors import ModelError, RequestError
from topwork.common.files import read_text
from topwork.common.hub import fetched_adapter, is_hub_id
from topwork.common.os_errors import check_link
from topwork.common.paths import is_path, missed, plain_path
from topwork.models.config import ModelConfig
from topwork.models.source import find_source
from topwork.models.tokenizer import load_config
from topwork.quantization.config import QuantizationConfig
from topwork.recipe.recipe import Recipe
from topwork.run.chosen import choose
from topwork.run.folder import RECIPE, RESULT, TEMPLATE, read_recipe
from topwork.run.vocabulary import with_vocabulary
from topwork.training.checkpoint import checkpoint_step, list_checkpoints
from topwork.training.trial import CHECKPOINTS

ADAPTER_CONFIG = "adapter_config.json"
Log = Callable[[str], None]


@dataclass(frozen=True)
class Given:
    """One adapter, read, and the base that it goes on.

    place         what was named; of a folder inside a run the run
    folder        the PEFT folder
    saved         what stands in it
    model         its base: a run's own, or what was named beside it, or what the adapter's file names
    quantization  how a run held its base in training; nothing for an adapter alone
    recipe        the run's; None for an adapter alone
    template      the chat template that the run was trained with (the file's text); None for the base's own
    checkpoint    the step of the run's checkpoint that it is of; None for a finished adapter, and for one alone
    hub_id        what the Hub calls it, where it is from there
    """

    place: Path
    folder: Path
    saved: SavedAdapter
    model: ModelConfig
    quantization: QuantizationConfig
    recipe: Recipe | None
    template: str | None
    checkpoint: int | None = None
    hub_id: str | None = None

    @property
    def name(self) -> str:
        """What people call it: no place on this machine."""
        return self.hub_id or self.place.resolve().name

    @property
    def run(self) -> Path | None:
        """The run's folder; None for an adapter alone."""
        return self.place if self.recipe is not None else None


def is_adapter(place: Path) -> bool:
    """Whether a folder is a run's or an adapter's, and not a model's."""
    return (place / RECIPE).is_file() or (adapter_folder(place) / ADAPTER_CONFIG).is_file()


def run_of(place: Path) -> tuple[Path, int | None]:
    """The run whose `adapter/` or checkpoint is named, and the checkpoint's step: that folder alone tells neither the
    chat template that was learned by nor how the base was held. Any other place as it is."""
    named = place.absolute()
    if _is_inner(named) and (named.parent / RESULT).is_file() and (named.parent / RECIPE).is_file():
        return named.parent, None
    inside = named.parent if _is_inner(named) else named
    run = inside.parent.parent
    if inside.parent.name == CHECKPOINTS and (run / RECIPE).is_file() and inside in list_checkpoints(inside.parent):
        return run, checkpoint_step(inside)
    return place, None


def _is_inner(place: Path) -> bool:
    """Whether it is the adapter's folder in a run or in a checkpoint."""
    inner = adapter_folder(place.parent)
    return inner != place.parent and place.is_dir() and inner.resolve() == place.resolve()


def names_run(place: Path | str, model: str | None = None) -> bool:
    """Whether a run is meant, with all that it tells of its adapter. An adapter's own folder beside which a model is
    named is that adapter alone, even in a run."""
    return (_run_named(Path(plain_path(str(place))), model)[0] / RECIPE).is_file()


def is_alone(place: Path | str, model: str | None = None) -> bool:
    """Whether an adapter is meant of which no run tells: a PEFT folder, or what may be an id on the Hub."""
    if names_run(place, model):
        return False
    path = Path(plain_path(str(place)))
    return is_adapter(path) or (isinstance(place, str) and not path.exists())


def _run_named(place: Path, model: str | None) -> tuple[Path, int | None]:
    alone = (place / ADAPTER_CONFIG).is_file() and model is not None
    return (place, None) if alone else run_of(place)


def place_of(named: Path | str) -> tuple[Path, str | None]:
    """The folder that is named, and the id of an adapter that the Hub has, which is fetched. A Path is a folder; a text
    that names nothing here and may be an id is asked for there. Raises AdapterError."""
    given = plain_path(str(named))
    if isinstance(named, Path) or os.path.lexists(given) or is_path(given) or not is_hub_id(given):
        return Path(given), None
    return fetched_adapter(given, missed(given)), given


def given_adapter(
    place: Path | str, model: str | None = None, checkpoint: str | int | None = None, log: Log = print
) -> Given:
    """Read the adapter of a run's folder, of a PEFT folder, or of an id on the Hub.

    model       the base, where the one that the run or the PEFT folder names is not to be found here
    checkpoint  a run's: a step, `best` or `last`; left out, the finished adapter, or where there is none yet the newest
                checkpoint's, which `log` is told

    Raises RequestError for what is neither and for a checkpoint that is not there; ModelError where a run's base is
    not; AdapterError and CheckpointError for a folder that cannot be read.
    """
    place, hub_id = place_of(place)
    check_link(place)
    run, step = _run_named(place, model)
    if (run / RECIPE).is_file():
        return _of_run(run, model, _one(place, step, checkpoint), log)
    if checkpoint is not None:
        raise RequestError(
            f"--checkpoint {checkpoint}: {place} is no run's folder (no {RECIPE}), and only runs have them"
        )
    return replace(_alone(place, model), hub_id=hub_id)


def given_run(
    place: Path | str, model: str | None = None, checkpoint: str | int | None = None, log: Log = print
) -> Given:
    """The same of a run alone. Raises RequestError for any other folder."""
    check_link(Path(place))
    run, step = run_of(Path(place))
    return _of_run(run, model, _one(Path(place), step, checkpoint), log)


def _one(place: Path, step: int | None, checkpoint: str | int | None) -> str | int | None:
    if step is not None and checkpoint is not None:
        raise RequestError(f"--checkpoint {checkpoint}: {place} is a checkpoint already; give one of the two")
    return step if step is not None else checkpoint


def _of_run(run: Path, model: str | None, checkpoint: str | int | None, log: Log) -> Given:
    recipe = read_recipe(run)
    chosen = choose(run, recipe, checkpoint, log)
    base = base_of(run, recipe, model, log)
    stored = run / TEMPLATE
    template = read_text(stored, "bring back a copy of it") if stored.exists() else None
    return Given(
        run, chosen.folder, chosen.saved, base, recipe.quantization, recipe, template, chosen.checkpoint
    )  # fmt: skip


def base_of(run: Path, recipe: Recipe, model: str | None, log: Log) -> ModelConfig:
    """A run's base: where `model` says it is now, or as its recipe has it. Raises ModelError where that is not here;
    whether it is the same is told by its fingerprint, once it is read."""
    if model is not None:
        return recipe.model.model_copy(update={"model_name_or_path": model, "revision": None})
    try:
        load_config(find_source(recipe.model, log), recipe.model.trust_remote_code)
    except ModelError as error:
        raise ModelError(
            f"{run} was trained on {recipe.model.model_name_or_path!r}, which is not to be had here "
            f"({str(error).splitlines()[0]}). Where it lies elsewhere now, point to it with --model"
        ) from error
    return recipe.model


def _alone(place: Path, model: str | None) -> Given:
    folder = adapter_folder(place)
    if not (folder / ADAPTER_CONFIG).is_file():
        if inner := sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}")):
            raise RequestError(
                f"{place} is no adapter's folder itself and holds {', '.join(str(path) for path in inner)}, as PEFT "
                f"saves adapters that have names; give {'that' if len(inner) == 1 else 'one of them'}"
            )
        raise RequestError(
            f"{place} is neither a run's folder (no {RECIPE}) nor an adapter's (no {ADAPTER_CONFIG}); give the "
            "output_dir of a `topwork train`, or a PEFT folder"
        )
    saved = read_adapter(folder)
    named = model or saved.base.name
    if not named:
        raise RequestError(f"{place} does not name its base; give it with --model")
    base = with_vocabulary(ModelConfig(model_name_or_path=named, dtype="auto"), saved, folder)
    return Given(place, folder, saved, base, QuantizationConfig(), None, None)
