"""What DATA is for: rows to learn, to validate on, to test on; and how a recipe names them."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from topwork.common.errors import DataError
from topwork.common.paths import is_folder, is_there, plain_path
from topwork.data.files.places import find_place, kind_of, split_of

_PLAIN_NAMES = ("data", "dataset", "rows", "examples", "all", "")


@dataclass(frozen=True)
class NewSources:
    """Paths as they are reached from the current folder. `beside` are files next to a training file whose names say
    that they are for validation or tests; nobody named them."""

    train: list[str]
    eval: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)

    @property
    def are_texts(self) -> bool:
        """Whether all that is learned are .txt files."""
        return all(_holds_texts(path) for path in self.train)

    @property
    def name(self) -> str:
        """A name for the run: the first source's, or its folder's where that is called like every other."""
        first = Path(self.train[0].partition(":")[0] if not is_there(Path(self.train[0])) else self.train[0]).resolve()
        stem = first.name.partition(".")[0]
        if split_of(stem) is not None or stem.lower() in _PLAIN_NAMES:
            stem = first.parent.name
        return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-").lower() or "run"


def find_sources(data: Sequence[str]) -> NewSources:
    """By their names: of several files those that are called after validation or test are held out. Raises DataError
    for what is not there, with the nearest names."""
    if not data:
        raise DataError("no data was named; expected files, folders or data sets of the Hub: topwork init MODEL DATA")
    given = [plain_path(each) for each in data]
    for path in given:
        find_place(path)
    kinds = {path: split_of(Path(path).name) if not is_folder(Path(path)) else None for path in given}
    train = [path for path in given if kinds[path] not in ("validation", "test")]
    if not train:
        return NewSources(given, beside=[])
    held = [path for path in given if kinds[path] == "validation"]
    test = [path for path in given if kinds[path] == "test"] or _tests_in(train)
    return NewSources(train, held, test, _beside(train) if len(given) == 1 else [])


def written(path: str, folder: Path) -> str:
    """A path as a recipe in `folder` names it: from there on, where both lie below the current folder or it lies beside
    the recipe; data sets of the Hub and patterns as they are given."""
    if not is_there(Path(path)):
        return path
    full, here = Path(path).resolve(), Path.cwd().resolve()
    folder = folder.resolve()
    if full.is_relative_to(folder) or (full.is_relative_to(here) and folder.is_relative_to(here)):
        return Path(os.path.relpath(full, folder)).as_posix()
    return str(full)


def _holds_texts(path: str) -> bool:
    place = find_place(path)
    if place is None or place.saved:
        return False
    files = [file for several in place.splits.values() for file in several]
    return all(kind_of(file) == ".txt" for file in files)


def _tests_in(train: Sequence[str]) -> list[str]:
    """Folders that have a test split beside what is learned of them."""
    found = []
    for path in train:
        place = find_place(path)
        if place is not None and not place.alone and any(split_of(name) == "test" for name in place.splits):
            found.append(path)
    return found if len(found) == 1 else []


def _beside(train: Sequence[str]) -> list[str]:
    own = Path(train[0])
    if not own.is_file():
        return []
    near = [path for path in sorted(own.parent.iterdir()) if path != own and kind_of(path) == kind_of(own)]
    held = [path for path in near if split_of(path.name) in ("validation", "test")]
    return [str(path) for path in held if _without_split(path) == _without_split(own)]


def _without_split(path: Path) -> list[str]:
    """The words of a file's name but for those that say its split."""
    return [word for word in re.split(r"[\W\d_]+", path.name.lower()) if word and split_of(word) is None]
