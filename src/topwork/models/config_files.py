"""From what a recipe calls its model to what its config.json says, free of torch and transformers.

A folder, a config.json, a `.gguf` file, a shipped shape (`shapes/`) or a Hub id, in this order. The Hub is asked last:
for an id that is neither in its cache nor a shipped shape's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from topwork.common.errors import ModelError, did_you_mean, quoted
from topwork.common.hub import ask_hub, is_hub_id
from topwork.common.os_errors import check_link, why
from topwork.common.paths import is_path, is_there, missed, plain_path
from topwork.models.gguf_config import gguf_values
from topwork.models.source import ALIASES


@dataclass(frozen=True)
class ConfigFile:
    """Where a model's config is: a config.json or a `.gguf` file on this disk, or a shape that is shipped. `hub_id` is
    set where it came from the Hub or its cache."""

    name: str
    file: Path | Traversable
    shipped: bool = False
    hub_id: str | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether the config is the header of a `.gguf` file."""
        return self.file.name.lower().endswith(".gguf")

    def values(self) -> dict[str, Any]:
        """What the config.json says, or a `.gguf` file's header where that is of a family that is known so; nothing
        where it is not. Raises ModelError for a file that is none."""
        if self.is_gguf:
            return gguf_values(Path(str(self.file))) or {}
        try:
            given = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # brackets without end recurse
            raise ModelError(f"{self.file} cannot be read as a config.json: {why(error)}") from error
        if not isinstance(given, dict):
            raise ModelError(f"{self.file} holds no config, expected a JSON object with the model's sizes")
        if not isinstance(given.get("model_type", ""), str):
            raise ModelError(
                f"{self.file} has model_type: {quoted(given['model_type'])}, expected a name such as llama"
            )
        return given


def find_config(name: str, revision: str | None = None) -> ConfigFile:
    """Where the config of a model is, which is taken from the Hub only where it is nowhere here. Raises ModelError."""
    path = Path(plain_path(name))
    check_link(path)
    if name and name not in ALIASES and is_there(path):
        return _local(path, name)
    shapes = _shapes()
    if name in shapes:
        return ConfigFile(name, shapes[name], shipped=True)
    hub_id = ALIASES.get(name, name)
    if is_hub_id(hub_id) and not is_path(name):
        return _of_hub(hub_id, revision)
    known = sorted({*shape_names(), *ALIASES})
    raise ModelError(
        f"there is no model {name!r}: expected a folder, a config.json, a .gguf file, a Hub id (owner/name) "
        f"or one of {', '.join(known)}{did_you_mean(name, known) or missed(name)}"
    )


def shape_names() -> list[str]:
    """Well-known models whose configs are shipped, so that they are known without a network."""
    return sorted(_shapes())


def shape_values(name: str) -> Mapping[str, Any]:
    """What a shipped shape's config says."""
    return ConfigFile(name, _shapes()[name], shipped=True).values()


def _shapes() -> dict[str, Traversable]:
    folder = files("topwork.models") / "shapes"
    return {file.name.removesuffix(".json"): file for file in folder.iterdir() if file.name.endswith(".json")}


def _local(path: Path, name: str) -> ConfigFile:
    if not path.is_dir():
        return ConfigFile(name, path)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json, expected a Hugging Face model folder (weights are not needed)")
    return ConfigFile(name, path / "config.json")


def _of_hub(hub_id: str, revision: str | None) -> ConfigFile:
    """The copy in the Hub's cache, a shipped shape, or what the Hub gives."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    if isinstance(cached, str):
        return ConfigFile(hub_id, Path(cached), hub_id=hub_id)
    shipped = {shape_values(name)["_name_or_path"]: name for name in shape_names()}
    if hub_id in shipped and revision is None:
        return ConfigFile(hub_id, _shapes()[shipped[hub_id]], shipped=True, hub_id=hub_id)
    ask_hub(hub_id, revision, "model", did_you_mean(hub_id, shipped) or missed(hub_id))
    try:
        file = hf_hub_download(hub_id, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the config of {hub_id!r} is neither cached nor to be had from the Hub ({error}); check the name and the "
            f"network, or give its config.json{did_you_mean(hub_id, shipped)}"
        ) from error
    return ConfigFile(hub_id, Path(file), hub_id=hub_id)
