"""What a source's path names on disk: its files, and the split that each belongs to."""

import glob
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from topwork.common.errors import DataError, did_you_mean
from topwork.common.paths import is_folder, is_path, is_there, missed, plain_path
from topwork.data.files.decoding import unpacked_name

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".txt")
"""Kinds of data files; those of text may be packed."""
TABLES = (".parquet", ".arrow", ".xlsx")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+){0,2}")
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "holdout", "heldout"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_WORDS = {
    word + end: split for split, words in _WORDS.items() for word in words for end in ("", "set", "data", "split")
}
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")
_NO_DATA = re.compile(
    r"(readme|licen[cs]e|copying|requirements|(sha|md5|check)\w*sums?)\..*"
    r"|(dataset_infos?|dataset_dict|state|croissant|config)\.json",
    re.IGNORECASE,
)
_SHEET = re.compile(r"(.+\.xlsx):([^:/\\]+)", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://.*", re.IGNORECASE)
_AS_CSV, _AS_TEXT = "save its sheet as CSV in UTF-8", "save it as .txt in UTF-8"
_INSTEAD = {
    **dict.fromkeys((".xls", ".xlsm", ".xlsb", ".ods", ".numbers", ".gsheet"), _AS_CSV),
    **dict.fromkeys((".docx", ".doc", ".odt", ".rtf", ".pages", ".gdoc", ".pptx", ".epub", ".html"), _AS_TEXT),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack it"), ".pdf": "take its text out into a .txt",
    ".md": "name it .txt to learn it as text",
    ".pkl": "write it with pandas' to_json(orient='records', lines=True)", ".yaml": "write its rows as .jsonl",
    ".yml": "write its rows as .jsonl", ".db": "export its table as CSV", ".sqlite": "export its table as CSV",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """What a path names.

    splits  the files (of `save_to_disk`: the folders) of each split, by its name; those of none under ""
    root    the folder that names are told from
    alone   it names its files itself, so that none of them is left out: a file, or a glob that asks for them
    saved   whether `datasets`' save_to_disk wrote it
    split   which split the path itself asks for
    passed  files that are left out beside those
    """

    name: str
    root: Path
    splits: dict[str, list[Path]]
    alone: bool = False
    saved: bool = False
    split: str | None = None
    passed: tuple[Path, ...] = ()


def split_of(word: str) -> str | None:
    """train, validation or test, where a name holds one of the words for it, bounded as words are."""
    words = re.split(r"[\W\d_]+", word.lower().replace("held-out", "heldout").replace("hold-out", "holdout"))
    return next((SPLIT_WORDS[part] for part in words if part in SPLIT_WORDS), None)


def find_place(named: str) -> Place | None:
    """What is on disk under this name; None where it can only be a data set of the Hub. Raises DataError for a path of
    which there is nothing, with near names."""
    named = plain_path(named)
    path = Path(named)
    if is_folder(path):
        return _folder(path, None, None)
    if is_there(path):
        return Place(named, path.parent, {"": [path]}, alone=True)
    sheet = _SHEET.fullmatch(named)
    if sheet and (book := Path(sheet[1])).is_file():
        return Place(sheet[1], book.parent, {"": [book]}, alone=True, split=sheet[2])
    if _ADDRESS.fullmatch(named):
        raise DataError(
            f"{named} is an address on the web, and rows are read from files: download it, a sheet as CSV, and name "
            "the file; a data set of the Hub is owner/name"
        )
    head, *rest = named.split(":")
    if rest and len(rest) <= 2 and is_folder(Path(head)):
        return _folder(Path(head), rest[0] or None, rest[1] if len(rest) > 1 else None)
    if glob.has_magic(named):
        return _matches(path)
    if HUB_ID.fullmatch(named) and kind_of(path) not in (*SUFFIXES, *_INSTEAD) and not is_path(head):
        return None
    raise DataError(_missing(path))


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, without that of its packing."""
    return unpacked_name(path).suffix.lower()


def check_kind(path: Path) -> None:
    """Raises DataError where a file is of no kind that is read."""
    kind = kind_of(path)
    if kind in SUFFIXES and not (kind in TABLES and unpacked_name(path) != path):
        return
    instead = _INSTEAD.get(kind, "")
    if kind in TABLES:
        instead = "unpack it; it is packed inside already"
    raise DataError(
        f"{path} ends in {''.join(path.suffixes[-2:]) or 'nothing'!r}, which is no known kind of data file"
        f"{f': {instead}' if instead else ''}; expected one of {', '.join(sorted(SUFFIXES))} (those of text also .gz, "
        ".zst, .bz2, .xz)"
    )


def _missing(path: Path) -> str:
    hint = missed(path)
    if not is_folder(path.parent) and not hint:
        return f"{path} does not exist, nor does its folder {path.parent}; check the path (it starts at {Path.cwd()})"
    return f"{path} does not exist{hint or '; expected a data file, a folder of them, or a Hub id owner/name'}"


def _matches(pattern: Path) -> Place:
    """The files that a glob matches. Raises DataError where there are none."""
    found = sorted(Path(match) for match in glob.glob(str(pattern), recursive=True) if Path(match).is_file())
    files = [file for file in found if _is_data(file)]
    root = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    if not files:
        beside = (
            sorted(entry.name for entry in root.iterdir() if not entry.name.startswith(".")) if root.is_dir() else []
        )
        held = (
            f"{root} holds {', '.join(beside[:6])}{' …' if len(beside) > 6 else ''}" if beside else f"{root} is empty"
        )
        near = did_you_mean(pattern.name, beside)
        raise DataError(
            f"no data file matches {pattern}{near}; {held if root.is_dir() else f'the folder {root} does not exist'}"
        )
    splits = _by_split(files, root)
    alone = len(set(map(split_of, splits))) == 1
    return Place(str(pattern), root, {"": files} if alone else splits, alone)


# Folders


def _folder(folder: Path, config: str | None, split: str | None) -> Place:
    saved = folder / "dataset_dict.json"
    if saved.is_file():
        names = _json(saved).get("splits") or [entry.name for entry in folder.iterdir() if entry.is_dir()]
        return Place(str(folder), folder, {name: [folder / name] for name in names}, saved=True, split=split or config)
    if (folder / "state.json").is_file() and "_data_files" in _json(folder / "state.json"):
        return Place(str(folder), folder, {"": [folder]}, alone=True, saved=True)
    configs = _readme_configs(folder)
    if configs:
        return Place(str(folder), folder, _config_files(folder, configs, config), split=split)
    if config is not None and (folder / config).is_dir():
        return _folder(folder / config, None, split)
    files = _data_files(folder)
    if not files:
        raise DataError(f"the folder {folder} holds no data file; expected some of {', '.join(sorted(SUFFIXES))}")
    if config is not None and split is not None:
        raise DataError(f"{folder} has no configuration {config!r}; leave it out: {folder}::{split}")
    beside = (".txt", ".xlsx")  # where there are rows, a README of another name, and what they were exported from
    rows = [file for file in files if kind_of(file) not in beside]
    for kind in reversed(beside):
        rows = rows or [file for file in files if kind_of(file) == kind]
    passed = tuple(file for file in files if file not in rows)
    return Place(str(folder), folder, _by_split(rows, folder), split=split or config, passed=passed)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_data(file: Path) -> bool:
    """Whether it is of a kind that is read, and neither hidden nor about the data."""
    return kind_of(file) in SUFFIXES and not file.name.startswith((".", "_")) and not _NO_DATA.fullmatch(file.name)


def _data_files(folder: Path) -> list[Path]:
    """The data files of a folder, and of its folders that are splits or `data`; those of all its folders where it has
    none itself."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "_")))
    here = [entry for entry in entries if entry.is_file() and _is_data(entry)]
    folders = [entry for entry in entries if entry.is_dir()]
    if here:
        folders = [entry for entry in folders if split_of(entry.name) is not None or entry.name.lower() == "data"]
    return here + [file for inner in folders for file in _data_files(inner)]


def _by_split(files: Iterable[Path], root: Path) -> dict[str, list[Path]]:
    """Files by the split that their own name says, else the nearest of their folders."""
    found: dict[str, list[Path]] = {}
    for file in files:
        name = file.name[: -len("".join(file.suffixes[-1:]))]
        shard = _SHARD.match(name)
        split = (shard.group(1) if shard and split_of(shard.group(1)) else split_of(name)) or next(
            (own for part in reversed(file.relative_to(root).parts[:-1]) if (own := split_of(part))), ""
        )
        found.setdefault(split, []).append(file)
    return found


def _readme_configs(folder: Path) -> dict[str, Any]:
    """What the head of a Hub data set's README says: {configuration: its entry}."""
    try:
        text = (folder / "README.md").read_text("utf-8", errors="replace").removeprefix("\ufeff")
    except OSError:
        return {}
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|\Z)", text, re.DOTALL)
    try:
        values = yaml.safe_load(head.group(1)) if head else None
    except yaml.YAMLError:
        return {}
    configs = values.get("configs") if isinstance(values, dict) else None
    named = [each for each in configs if isinstance(each, dict)] if isinstance(configs, list) else []
    return {str(each.get("config_name", "default")): each for each in named if each.get("data_files")}


def _config_files(folder: Path, configs: dict[str, Any], asked: str | None) -> dict[str, list[Path]]:
    """The files of a configuration by split. Raises DataError where none is asked for and there are several."""
    names = [asked] if asked else [name for name, each in configs.items() if each.get("default")]
    names = names or (["default"] if "default" in configs else list(configs))
    if len(names) > 1:
        raise DataError(f"{folder} holds several configurations: {', '.join(names)}; name one: {folder}:{names[0]}")
    if names[0] not in configs:
        raise DataError(
            f"{folder} has no configuration {names[0]!r}{did_you_mean(names[0], configs)}; its README names "
            f"{', '.join(configs)}"
        )
    found = {
        split: files
        for split, patterns in _patterns(configs[names[0]]["data_files"]).items()
        if (files := sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}))
    }
    if not found:
        raise DataError(f"{folder}: the README's configuration {names[0]!r} names data files of which none is there")
    return found


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """{split: globs} of a README's data_files: a glob, a list of globs, or a list of {split, path}."""
    several = data_files if isinstance(data_files, list) else [data_files]
    found: dict[str, list[str]] = {}
    for each in several:
        split, paths = ("train", each) if isinstance(each, str) else (str(each.get("split", "train")), each.get("path"))
        listed = paths if isinstance(paths, list) else [paths]
        found.setdefault(split, []).extend(str(path).removeprefix("./") for path in listed)
    return found
