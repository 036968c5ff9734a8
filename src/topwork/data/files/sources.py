"""Which files a source is: the split that is read of a folder, what is left out of it, and what validates."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from topwork.common.errors import DataError, did_you_mean
from topwork.common.memory import free_host_memory
from topwork.common.yaml_text import in_yaml
from topwork.data.config import DataConfig, SourceConfig
from topwork.data.files.decoding import DataFile, packing, unpacked_name
from topwork.data.files.places import SPLIT_WORDS, Place, check_kind, find_place, kind_of, split_of

HELD_OUT = "validation|test|"
"""What is read of a folder as `data.eval`: the first of these splits that it has, else what training would read."""
_LISTED = 4
_UNPACKED = 4  # times as large as packed text, about


@dataclass(frozen=True)
class Located:
    """The files of a source, in their order, and what is to be told of them.

    saved  whether they are folders of `datasets`' save_to_disk
    """

    files: tuple[DataFile, ...]
    notes: tuple[str, ...]
    saved: bool = False


def locate(source: SourceConfig, documents: str = "file") -> Located | None:
    """The files that a source names; None where it is a data set of the Hub. Raises DataError where there are none, or
    only some that were made to test with."""
    place = find_place(source.path)
    if place is None:
        return None
    asked = place.split or source.split  # what the path says is for this source; the other may be a default
    names = list(place.splits) if place.alone else _chosen(place, asked)
    paths = [path for name in names for path in place.splits[name]]
    listed = None
    if place.alone and asked is not None and "|" not in asked:
        listed = _list_in(place, paths, asked)
    labels = _labels(paths, place.root)
    chosen = bool(source.columns) or source.format not in (None, "auto")
    if not place.saved:
        for path in paths:
            check_kind(path)
    files = [DataFile(path, label, source.encoding, documents, listed, chosen) for path, label in zip(paths, labels)]
    return Located(tuple(files), (*_told(place, names, asked, labels), *_twice(place, paths)), place.saved)


def _list_in(place: Place, paths: Sequence[Path], asked: str) -> str | None:
    """The list of a .json or the sheet of a .xlsx that `split` names. Raises DataError for what holds no splits."""
    if len(paths) == 1 and not place.saved and kind_of(paths[0]) in (".json", ".xlsx"):
        return asked
    if all(split_of(path.name) == split_of(asked) for path in paths) and split_of(asked) is not None:
        return None
    raise DataError(
        f"split is {asked!r}, and {place.name} is {'one data set' if place.saved else 'no folder'} without splits; "
        "leave split out, or name the folder that holds it"
    )


def _chosen(place: Place, asked: str | None) -> list[str]:
    """The names of the splits to read. Raises DataError where it cannot be told which."""
    for wanted in (asked or "").split("|"):
        names = _training(place) if not wanted else _named(place, wanted)
        if names:
            return names
    known = [name for name in place.splits if name]
    raise DataError(
        f"{place.name} has no split {asked!r}{did_you_mean(str(asked), known)}; "
        f"{'its splits are ' + ', '.join(known) if known else 'no file or folder in it is named after a split'}"
    )


def _named(place: Place, wanted: str) -> list[str]:
    exact = [name for name in place.splits if name.lower() == wanted.lower()]
    if exact:
        return exact
    kind = SPLIT_WORDS.get(wanted.lower())
    same = [name for name in place.splits if kind is not None and split_of(name) == kind]
    return _one(place, same, str(kind)) if same else []


def _training(place: Place) -> list[str]:
    train = [name for name in place.splits if split_of(name) == "train"]
    if train:
        return _one(place, train, "training")
    if "" in place.splits:
        return [""]
    others = [name for name in place.splits if split_of(name) is None]
    if others:
        return _one(place, others, "")
    held = ", ".join(f"{name} ({_names(place, [name])})" for name in place.splits)
    raise DataError(
        f"{place.name} holds nothing to train on, only the split{'s' if len(place.splits) > 1 else ''} {held}; to "
        f"learn it nevertheless, say so: {_as_source(place, next(iter(place.splits)))}"
    )


def _one(place: Place, names: list[str], what: str) -> list[str]:
    """Several splits of a kind have other rows each (train_sft, train_prefs), so one is to be named."""
    if len(names) > 1:
        raise DataError(
            f"{place.name} holds several {what + ' ' if what else ''}splits: {', '.join(names)}; name one: "
            f"{_as_source(place, names[0])}"
        )
    return names


def _as_source(place: Place, split: str) -> str:
    """What `data.train` says to read this split."""
    return in_yaml({"path": place.name, "split": split})


# What is told


def _told(place: Place, names: Sequence[str], asked: str | None, labels: Sequence[str]) -> list[str]:
    others = [each for each in place.splits if each not in names]
    apart = [path.relative_to(place.root).as_posix() for each in others for path in place.splits[each]]
    apart += [path.relative_to(place.root).as_posix() for path in place.passed]
    left = f"; not learned: {_list(apart)}" if apart and (asked is None or not others) else ""
    name, gone = _short(place), _missing_shards(place, names)
    if not others and names == [""]:
        counted = f"{len(labels)} files are read" if len(labels) > 1 else "one file is read"
        return [*([f"{name}: {counted} ({_list(labels)}){left}"] if len(labels) > 1 or left else []), *gone]
    which = "training" if split_of(names[0]) == "train" and names[0] == "train" else names[0]
    read = f"its {which} split is read" if which else "what is named after no split is read"
    return [f"{name}: {read} ({_names(place, names)}){left}", *gone]


_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\b")


def _missing_shards(place: Place, names: Sequence[str]) -> list[str]:
    """A line for each set of files (x-00000-of-00002) of which some are not there, as where a download ended early."""
    found: dict[tuple[str, int], int] = {}
    if not Path(place.name).is_dir():
        return []  # whoever names files means these
    for path in (path for name in names for path in place.splits[name]):
        shard = _SHARD.match(path.relative_to(place.root).as_posix())
        if shard:
            found[shard[1], int(shard[3])] = found.get((shard[1], int(shard[3])), 0) + 1
    return [
        f"warning: {_short(place)}: of {count} files {start}-…-of-{count:05} {count - here} "
        f"{'is' if count - here == 1 else 'are'} missing"
        for (start, count), here in found.items()
        if here < count
    ]


def _short(place: Place) -> str:
    return Path(place.name).name or place.name


def _names(place: Place, splits: Sequence[str]) -> str:
    paths = [path for split in splits for path in place.splits[split]]
    return _list([path.relative_to(place.root).as_posix() for path in paths])


def _list(names: Sequence[str]) -> str:
    more = f" … {len(names):,} files" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _labels(paths: Sequence[Path], root: Path) -> list[str]:
    """Names for people: a file's own, with its folders where another has the same."""
    times = Counter(path.name for path in paths)
    return [path.name if times[path.name] == 1 else path.relative_to(root).as_posix() for path in paths]


def _twice(place: Place, paths: Sequence[Path]) -> list[str]:
    """Files of one name in several formats, which are often the same rows."""
    found: dict[Path, list[str]] = {}
    for path in paths:
        found.setdefault(unpacked_name(path).with_suffix(""), []).append(path.name)
    return [
        f"{_short(place)}: {' and '.join(names)} have one name in several formats, and all are read; if they are "
        "the same rows, name one of them"
        for names in found.values()
        if len(names) > 1
    ]


# What validates


def implied_eval(config: DataConfig) -> list[SourceConfig] | None:
    """The validation split of the folders in `data.train`, where `data.eval` is left out and they have one."""
    if config.eval is not None:
        return None
    found: list[SourceConfig] = []
    for source in config.sources(config.train):
        place = find_place(source.path)
        if place is None or place.alone or split_of(place.split or source.split or "train") != "train":
            continue
        held = [name for name in place.splits if split_of(name) == "validation"]
        if len(held) == 1:
            found.append(source.model_copy(update={"split": held[0], "weight": 1.0, "max_rows": None}))
    return found or None


def with_held_out(config: DataConfig) -> DataConfig:
    """The options with what validates written out: of folders their validation split, else their test split."""
    if config.eval is None:
        implied = implied_eval(config)
        return config if implied is None else config.model_copy(update={"eval": implied})
    named = [source.model_copy(update={"split": source.split or HELD_OUT}) for source in config.sources(config.eval)]
    return config.model_copy(update={"eval": named})


# Memory


def memory_notes(config: DataConfig) -> list[str]:
    """What is to be told before files are read that memory may be too small for."""
    if config.streaming:
        return []
    free_bytes = free_host_memory().bytes
    notes = []
    for source in [*config.sources(config.train), *(config.sources(config.eval) if config.eval is not None else [])]:
        found = locate(source)
        size = 0 if found is None or source.max_rows or config.max_rows else sum(map(file_bytes, found.files))
        if size > free_bytes / 2:
            notes.append(
                f"warning: {Path(source.path).name} holds about {size / 2**30:.1f} GiB, and {free_bytes / 2**30:.1f} "
                "GiB of memory are free; if its rows do not fit, data.streaming: true reads them as they are needed"
            )
    return notes


def file_bytes(file: DataFile) -> int:
    """About how large a file's rows are; folders are memory-mapped, and their rows as large as their files."""
    if file.path.is_dir():
        return sum(inner.stat().st_size for inner in file.path.rglob("*") if inner.is_file())
    packed = packing(file.path) or kind_of(file.path) in (".parquet", ".xlsx")
    return file.path.stat().st_size * (_UNPACKED if packed else 1)
