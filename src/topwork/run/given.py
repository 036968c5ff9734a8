"""An adapter as a command is given it: a run's folder, or any PEFT folder together with its base."""

from dataclasses import dataclass
from pathlib import Path

from topwork.adapters.foreign import adapter_folder
from topwork.adapters.peft_format import SavedAdapter, read_adapter
from topwork.common.errors import RequestError
from topwork.common.files import read_text
from topwork.common.os_errors import check_link
from topwork.models.config import ModelConfig
from topwork.quantization.config import QuantizationConfig
from topwork.recipe.recipe import Recipe
from topwork.run.folder import RECIPE, RESULT, TEMPLATE, finished_recipe

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Given:
    """One adapter, read, and the base that it goes on.

    place         what was named
    folder        the PEFT folder
    saved         what stands in it
    model         its base: a run's own, or what was named beside an adapter, or what the adapter's file names
    quantization  how a run held its base in training; nothing for an adapter alone
    recipe        the run's; None for an adapter alone
    template      the chat template that the run was trained with (the file's text); None for the base's own
    """

    place: Path
    folder: Path
    saved: SavedAdapter
    model: ModelConfig
    quantization: QuantizationConfig
    recipe: Recipe | None
    template: str | None


def is_adapter(place: Path) -> bool:
    """Whether a folder is a run's or an adapter's, and not a model's."""
    return (place / RECIPE).is_file() or (adapter_folder(place) / ADAPTER_CONFIG).is_file()


def run_of(place: Path) -> Path:
    """The run whose `adapter/` is named, since that folder alone tells neither the chat template that was learned by
    nor how the base was held; any other place as it is."""
    run = place.absolute().parent
    return run if (run / RESULT).is_file() and (run / RECIPE).is_file() and _same(adapter_folder(run), place) else place


def _same(one: Path, other: Path) -> bool:
    return other.is_dir() and one.resolve() == other.resolve()


def given_adapter(place: Path | str, model: str | None = None) -> Given:
    """Read the adapter of a run's folder, or of a PEFT folder. `model` names the base of a PEFT folder whose own name
    for it is not to be found here.

    Raises RequestError for what is neither, for a run that has no adapter yet and for one that is given a `model`;
    AdapterError for a folder that cannot be read.
    """
    place = Path(place)
    check_link(place)
    place = run_of(place) if model is None else place
    if (place / RECIPE).is_file():
        if model is not None:
            raise RequestError(f"--model {model}: {place} is a run and names its base itself; leave --model out")
        recipe, folder = finished_recipe(place), adapter_folder(place)
        stored = place / TEMPLATE
        template = read_text(stored, "bring back a copy of it") if stored.exists() else None
        return Given(place, folder, read_adapter(folder), recipe.model, recipe.quantization, recipe, template)
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
    base = ModelConfig(model_name_or_path=named, dtype="auto")
    return Given(place, folder, saved, base, QuantizationConfig(), None, None)
