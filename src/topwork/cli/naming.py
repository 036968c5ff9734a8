"""`--model M --adapter A`, wherever a command takes a run's folder. Free of torch.

An adapter is a run, any PEFT folder or an id on the Hub; it stands in RUN's place, and the model where its base is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from topwork.common.errors import RequestError
from topwork.common.files import read_object
from topwork.common.hub import fetched_adapter, is_hub_id
from topwork.common.paths import is_path, plain_path

RECIPE, CONFIG = "recipe.yaml", "adapter_config.json"

Adapter = Annotated[
    str | None,
    typer.Option(metavar="FOLDER|ID", help="In RUN's place: any PEFT folder, a run's, or an id on the Hub."),
]
Model = Annotated[
    str | None, typer.Option(help="The base, where the run or the adapter's file does not name it rightly.")
]


def named_first(
    words: Sequence[str | None], adapter: str | None, names: Sequence[str]
) -> tuple[Path | str, list[str | None]]:
    """The arguments of a command that are called `names`, of which --adapter stands for the first: the others move up,
    and those that are missing are None. An argument is a folder, a Path; --adapter may be an id on the Hub, a text.
    Raises RequestError where an adapter is named twice, or none is."""
    said = [word for word in words if word is not None]
    if adapter is not None:
        if len(said) >= len(names) or (said and _holds_adapter(said[0])):
            raise RequestError(
                f"--adapter {adapter} and {said[0]}: both name an adapter ({names[0]}); give one of them, and with "
                "--model where its base is"
            )
        return adapter, [*said, *[None] * (len(names) - 1 - len(said))]
    if not said:
        raise RequestError(
            f"give {names[0]}, or --adapter with a PEFT folder or an id on the Hub (and --model where it does not name "
            "its base rightly)"
        )
    return Path(plain_path(said[0])), [*said[1:], *[None] * (len(names) - len(said))]


def needed(given: str | None, name: str, what: str) -> str:
    """An argument that there has to be. Raises RequestError."""
    if given is None:
        raise RequestError(f"{name} is missing: {what}")
    return given


def _holds_adapter(word: str) -> bool:
    """Whether it is a run's or an adapter's folder, and not what it stands in the place of."""
    place = Path(word)
    try:
        return any((place / name).is_file() for name in (RECIPE, CONFIG))
    except OSError:  # a question is longer than a name may be
        return False


def base_named_by(adapter: str) -> str:
    """The base of an adapter: a run's folder itself, which brings its base as it was held, or the base that a PEFT
    folder's file names. Raises RequestError."""
    place = Path(plain_path(adapter))
    if (place / RECIPE).is_file():
        return str(place)
    if not place.exists() and is_hub_id(adapter) and not is_path(adapter):
        place = fetched_adapter(adapter)
    files = [folder / CONFIG for folder in (place, place / "adapter") if (folder / CONFIG).is_file()]
    if not files:
        raise RequestError(f"--adapter {adapter}: no run's folder ({RECIPE}) and no PEFT folder ({CONFIG})")
    told = read_object(files[0], "bring back a copy of it").get("base_model_name_or_path")
    if not isinstance(told, str) or not told:
        raise RequestError(f"--adapter {adapter}: its {CONFIG} does not name its base; give it with --model")
    return told
