"""Where the paths in a recipe lie. Whoever names one decides where it is looked for first: what the recipe's file names
beside that file, what the command line names in the current folder; then in the other of the two, in silence.
`output_dir` is relative to the current folder, whoever names it."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from topwork.common.errors import RecipeError, did_you_mean
from topwork.common.paths import missed, plain_path, variable_in

PATHS = {
    "data": ("train", "eval", "chat_template"), "evaluation": ("data",),
    "model": ("model_name_or_path", "tokenizer_name_or_path"), "adapter": ("init_from",),
}  # fmt: skip
"""The options that are paths, beside output_dir; what jobs lay over the sections has the same."""
OUTPUT, JOBS = "output_dir", "jobs"
_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".xlsx", ".txt", ".gz", ".zst")
_LONGEST_NAME = 255


def named_in_file(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe's values with its paths absolute where they are there, so that a run can be opened from anywhere. A data
    file that is nowhere is missed beside the recipe where something there has nearly its name. Raises RecipeError."""
    return _placed(values, (folder, Path()), folder)


def named_here(key: str, value: Any) -> Any:
    """The value that `--set` or `--grid` gives to a dotted key, with its paths absolute where they are there. Raises
    RecipeError."""
    nested, keys = value, key.split(".")
    for part in reversed(keys):
        nested = {part: nested}
    nested = _placed(nested, (Path(),), None)
    for part in keys:
        nested = nested[part]
    return nested


def run_folder(named: str) -> str:
    """An `output_dir` as it is meant. Raises RecipeError for one that would make a folder called `~`, or called after a
    variable."""
    path = plain_path(named)
    variable = variable_in(path)
    parted = os.sep == "/" and "\\" in path
    if path.startswith("~") or parted or (variable is not None and not Path(path).exists()):
        raise RecipeError(f"output_dir {named!r} cannot be a run's folder{missed(path)}")
    if not path:
        raise RecipeError("output_dir is empty; name the run's folder, or leave it out")
    return path


def _placed(values: dict[str, Any], places: Sequence[Path], near: Path | None) -> dict[str, Any]:
    found = dict(values)
    for section, names in PATHS.items():
        options = values.get(section)
        if isinstance(options, dict):
            found[section] = {
                key: _found_in(value, places, near) if key in names else value for key, value in options.items()
            }
    if isinstance(values.get(OUTPUT), str):
        found[OUTPUT] = run_folder(values[OUTPUT])
    if isinstance(values.get(JOBS), list):
        found[JOBS] = [_placed(job, places, near) if isinstance(job, dict) else job for job in values[JOBS]]
    return found


def _found_in(value: Any, places: Sequence[Path], near: Path | None) -> Any:
    """`_found` of a path, of each in a list, and of `path` in a source that is an object."""
    if isinstance(value, list):
        return [_found_in(each, places, near) for each in value]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return {**value, "path": _found(value["path"], places, near)}
    return _found(value, places, near) if isinstance(value, str) else value


def _found(given: str, places: Sequence[Path], near: Path | None) -> str:
    """The absolute path of a file or folder, or of a glob that matches some; else what was given as a plain path. What
    follows a folder's name, `:configuration:split`, stays."""
    if _is_text(given):
        return given
    value = plain_path(given)
    head, colon, rest = value.partition(":")
    for place in places:
        matches = glob.has_magic(value) and next(glob.iglob(value, root_dir=place, recursive=True), None) is not None
        if matches or (value and (place / value).exists()):
            return str((place / value).resolve())
        if colon and head and _has_parts(place / head):
            return f"{(place / head).resolve()}:{rest}"
    return value if near is None else _missed_beside(value, near)


def _missed_beside(value: str, folder: Path) -> str:
    beside = folder / value
    if beside.suffix in _DATA_SUFFIXES and beside.parent.is_dir():
        like = glob.has_magic(value) or did_you_mean(beside.name, [entry.name for entry in beside.parent.iterdir()])
        return str(beside.absolute() if beside.is_symlink() else beside.resolve()) if like else value
    return value


def _is_text(value: str) -> bool:
    """Whether it is a template's text, not a path."""
    text = value.strip()
    long = any(len(os.fsencode(part)) > _LONGEST_NAME for part in text.split("/"))
    return "\n" in text or "{{" in text or "{%" in text or long or "\0" in text


def _has_parts(path: Path) -> bool:
    """Whether `:part` behind it names a split of a folder, or a sheet of a workbook."""
    return path.is_dir() or (path.suffix.lower() == ".xlsx" and path.is_file())
