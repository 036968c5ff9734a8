"""Reading serve.yaml: the file, with what the command line says over it; wrong keys are told with near ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from topwork.common.errors import RecipeError, RequestError, did_you_mean
from topwork.recipe.pasted import setting
from topwork.recipe.recipe import parse_yaml
from topwork.serving.config import ServeConfig


def load_config(
    path: Path | None = None, overrides: Sequence[str] = (), given: Mapping[str, Any] | None = None
) -> ServeConfig:  # fmt: skip
    """The file, `given` over it (its sections are laid over the file's), and `a.b=c` over both.

    Files and folders that stand beside the file are taken from there. Raises RequestError naming the key, what was
    expected and the nearest key that there is.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{path} cannot be read ({error}); give a YAML file") from error
        values = _beside(parse_yaml(text, str(path)), path.parent)
    values = _over(values, given or {})
    for override in overrides:
        parts = setting(override)
        if parts is None:
            raise RequestError(f"--set {override!r}: expected a.b=value, for example engine.batch_size=32")
        values = _over(values, _nested(parts[0].split("."), _value(override, parts[1])))
    return make_config(values, str(path or "the server's options"))


def make_config(values: Mapping[str, Any], source: str) -> ServeConfig:
    """A ServeConfig from plain values. Raises RequestError."""
    kept = {key: value for key, value in values.items() if value is not None}
    if "model" not in kept:
        raise RequestError(f"{source}: no model; give one: topwork serve MODEL, or model: in the file")
    if isinstance(kept["model"], str):
        kept["model"] = {"model_name_or_path": kept["model"]}
    try:
        return ServeConfig.model_validate(kept)
    except ValidationError as error:
        raise RecipeError("\n".join([f"{source}:", *(f"  {_explained(e)}" for e in error.errors())])) from error


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, section by section."""
    found = dict(below)
    for key, value in above.items():
        under = found.get(key)
        if key == "model" and isinstance(under, str):
            under = {"model_name_or_path": under}
        found[key] = _over(under, value) if isinstance(value, Mapping) and isinstance(under, Mapping) else value
    return found


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    return {keys[0]: _nested(keys[1:], value) if len(keys) > 1 else value}


def _value(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError(f"--set {override!r}: the value is not YAML: {error}") from error


def _beside(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Paths that exist beside the file are taken from there, all others from the working directory."""

    def found(value: Any) -> Any:
        if not isinstance(value, str) or "\n" in value or "{" in value or len(value) > 255:
            return value
        return str((folder / value).resolve()) if (folder / value).exists() else value

    made = {
        key: found(value) if key in ("model", "adapters_folder", "chat_template", "state_folder") else value
        for key, value in values.items()
    }
    if isinstance(model := made.get("model"), dict):
        made["model"] = {key: found(v) if key == "model_name_or_path" else v for key, v in model.items()}
    if isinstance(adapters := made.get("adapters"), dict):
        made["adapters"] = {name: found(path) for name, path in adapters.items()}
    elif isinstance(adapters, list):
        made["adapters"] = [
            {**e, "path": found(e["path"])} if isinstance(e, dict) and "path" in e else e for e in adapters
        ]
    return made


def _explained(entry: Any) -> str:
    keys = [str(part) for part in entry["loc"]]
    where = ".".join(keys)
    if entry["type"] == "extra_forbidden":
        known = _fields(entry["loc"][:-1])
        return f"unknown key {where!r}" + (did_you_mean(keys[-1], known) or f"; known here: {', '.join(sorted(known))}")
    if entry["type"] == "missing":
        return f"{where!r} is needed and missing"
    if entry["type"] == "value_error":
        return f"{where}: {entry['ctx']['error']}" if where else str(entry["ctx"]["error"])
    return f"{where!r}: {entry['msg'].lower()}, given {entry.get('input')!r}"


def _fields(path: Sequence[str | int]) -> Mapping[str, Any]:
    """The keys of the section at `path`."""
    fields: Mapping[str, Any] = ServeConfig.model_fields
    for part in path:
        if isinstance(part, str) and part in fields:
            kind = fields[part].annotation
            kinds = [k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel)]
            fields = {key: field for k in kinds for key, field in k.model_fields.items()}
    return fields
