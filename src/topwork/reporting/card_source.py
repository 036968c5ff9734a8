"""What a model card is made of: the files of a run, or of a folder that was merged, combined or exported."""

import copy
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

from topwork.common.errors import RequestError
from topwork.common.hub import HUB_ID
from topwork.models.source import ALIASES
from topwork.reporting.checkpoints import records_to, result_at
from topwork.reporting.markdown import one_line
from topwork.reporting.readers import parse_recipe, read_json, read_text, scores_file, section

Kind = Literal["adapter", "model", "gguf"]
TRAINING = "training"
"""Where a pushed folder keeps what its run wrote; at the top a recipe.yaml would make it a run's folder."""
MADE = ("merge", "combine", "export", "convert")
"""Commands that tell in a JSON file of their own what they wrote."""


@dataclass(frozen=True)
class CardSource:
    """name      what the thing is called
    repo      where others find it; None where nobody has said so yet
    kind      what the folder holds
    base      the base's id, as others find it; None where it has none
    local     what a base without an id is called: the last part of its path
    adapter   adapter_config.json
    made_by   the command that wrote the folder, "" for a run's
    made      what that command tells of it
    files     the names of the GGUF files in it
    template  whether a chat template of its own stands in it
    tokenizer whether its tokenizer does, or will where it is pushed
    """

    name: str
    repo: str | None
    kind: Kind
    base: str | None
    local: str
    adapter: Mapping[str, Any]
    recipe: Mapping[str, Any]
    result: Mapping[str, Any]
    provenance: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    made_by: str
    made: Mapping[str, Any]
    files: tuple[str, ...]
    template: bool
    tokenizer: bool

    @property
    def folded(self) -> bool:
        """Whether an adapter is part of the weights."""
        return self.kind != "adapter" and (self.made_by == "merge" or "merge" in section(self.made, "figures"))

    @property
    def gguf_adapter(self) -> bool:
        """Whether the GGUF files are an adapter's, alone or beside its base."""
        beside = self.made.get("format") == "ollama" and "model" in section(self.made, "figures")
        return self.kind == "gguf" and (self.made.get("format") == "gguf-adapter" or beside)


def read_source(folder: Path, run: Path | None, repo: str | None, base: str | None) -> CardSource:
    """`run` is where the folder's training is told, where it is no run itself; `base` overrules the base's name.

    Raises RequestError for a folder that holds neither an adapter nor a model.
    """
    problems: list[str] = []
    trained = next((place for place in (run, folder, folder / TRAINING) if place and _tells_training(place)), folder)
    own = folder / "adapter" if (folder / "adapter" / "adapter_config.json").is_file() else folder
    made_by = next((name for name in MADE if own == folder and (folder / f"{name}.json").is_file()), "")
    adapter, made = read_json(own / "adapter_config.json", problems), read_json(folder / f"{made_by}.json", problems)
    provenance = read_json(trained / "provenance.json", problems)
    named = base or _base_name(provenance, made, adapter)
    step = made.get("checkpoint") if isinstance(made.get("checkpoint"), int) else None
    result = read_json(trained / "result.json", problems)
    return CardSource(
        name=one_line((repo or "").rpartition("/")[2] or _made_name(made_by, made, named) or folder.resolve().name),
        repo=repo,
        kind=_kind(own),
        base=named if is_hub_id(named) else None,
        local=last_part(named),
        adapter=adapter,
        recipe=parse_recipe(read_text(trained / "recipe.yaml", problems), problems),
        result=result if step is None else result_at(result, records_to(trained, step), step),
        provenance=provenance,
        evaluation=read_json(trained / scores_file(step), problems),
        made_by=made_by,
        made=made,
        files=tuple(sorted(path.name for path in folder.glob("*.gguf"))),
        tokenizer=own != folder or (folder / "tokenizer_config.json").is_file(),
        template=any((place / "chat_template.jinja").is_file() for place in (trained, folder)),
    )


def is_hub_id(name: str | None) -> bool:
    """Whether others find a model or a data set by this name."""
    return bool(name) and HUB_ID.fullmatch(str(name)) is not None and not Path(str(name)).exists()


def last_part(name: str | None) -> str:
    """What a path is called where its place is nobody's business."""
    return one_line(PurePath(str(name or "").replace("\\", "/")).name)


def portable_recipe(source: CardSource) -> dict[str, Any]:
    """The recipe's values without a place of this machine: files by their names alone."""
    values: dict[str, Any] = copy.deepcopy(dict(source.recipe))
    model, data, evaluation = (values.get(name) or {} for name in ("model", "data", "evaluation"))
    if model and model.get("model_name_or_path") not in ALIASES:  # an alias may stand for a copy of its own
        model["model_name_or_path"] = source.base or source.local
    for options, key, origin in ((data, "train", "train"), (data, "eval", "eval"), (evaluation, "data", "")):
        if options.get(key) is not None:
            options[key] = _portable(options[key], section(source.provenance, "data", origin))
    template = data.get("chat_template")
    if isinstance(template, str) and PurePath(template).suffix and "{" not in template:
        data["chat_template"] = "chat_template.jinja"
    if values.get("output_dir"):
        values["output_dir"] = last_part(values["output_dir"])
    return values


def hub_data(source: CardSource) -> list[str]:
    """The ids of the data sets on the Hub that it was trained on."""
    train = section(source.provenance, "data", "train")
    named = _paths(section(source.recipe, "data").get("train"))
    return list(dict.fromkeys(path.partition(":")[0] for path in named if _is_hub_data(path, train)))


def without_places(value: Any) -> Any:
    """What a command tells, the paths in it cut to their last parts."""
    if isinstance(value, Mapping):
        return {key: without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    return _PLACE.sub(lambda found: last_part(found.group()), value) if isinstance(value, str) else value


def data_name(path: str, origin: Mapping[str, Any]) -> str:
    """A source as others may read it: an id of the Hub as it is, of anything else its last part."""
    return path if _is_hub_data(path, origin) else last_part(path)


def _made_name(made_by: str, made: Mapping[str, Any], base: str | None) -> str:
    """What a command's folder is called: by what it holds, so that the same is the same wherever it lies."""
    what = made.get("format") or made.get("method") or made_by
    return f"{last_part(base) or 'model'}-{what}" if made_by else ""


def _tells_training(place: Path) -> bool:
    return (place / "recipe.yaml").is_file() or (place / "provenance.json").is_file()


def _kind(folder: Path) -> Kind:
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if any(folder.glob("*.gguf")):
        return "gguf"
    if (folder / "config.json").is_file():
        return "model"
    raise RequestError(
        f"{folder} holds neither an adapter (adapter_config.json) nor a model (config.json, or a .gguf file); give the "
        "output_dir of a `topwork train` that has finished, or what merge, combine or export wrote"
    )


def _base_name(provenance: Mapping[str, Any], made: Mapping[str, Any], adapter: Mapping[str, Any]) -> str | None:
    """The first name that one of these has: a run, the command that wrote the folder, the adapter."""
    told = (provenance, made, section(made, "figures", "merge"), adapter)
    for values in told:
        for found in (values.get("base"), values.get("base_model"), values.get("base_model_name_or_path")):
            name = (found.get("id") or found.get("name")) if isinstance(found, Mapping) else found
            if isinstance(name, str) and name:
                return ALIASES.get(name, name)
    return None


def _portable(value: Any, origin: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_portable(each, origin) for each in value]
    if isinstance(value, Mapping):
        return {**value, "path": _portable(value.get("path"), origin)}
    return data_name(value, origin) if isinstance(value, str) else value


def _paths(value: Any) -> list[str]:
    several = value if isinstance(value, list) else [value]
    found = (each.get("path") if isinstance(each, Mapping) else each for each in several)
    return [path for path in found if isinstance(path, str)]


def _is_hub_data(path: str, origin: Mapping[str, Any]) -> bool:
    """An id, and none of the files that were hashed when the run began."""
    if not is_hub_id(path.partition(":")[0]) or "sha256" in origin or PurePath(path).suffix in _OF_FILES:
        return False
    files = [str(file) for file in section(origin, "files")]
    return not any(file == path or file.startswith(f"{path}/") or fnmatch.fnmatch(file, path) for file in files)


_OF_FILES = (
    ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst", ".bz2", ".xz",
)  # fmt: skip
_PART = r"[^\s\\/:;,'\"()\[\]{}<>|]+"
_PLACE = re.compile(rf"(?<![\w/:.<-])(?:~|\.{{1,2}})?(?:/{_PART}){{2,}}/?|\b[A-Za-z]:\\(?:{_PART}\\?)+")
"""An absolute path, or one from the working or home directory, of two parts or more, wherever it stands in a text."""
