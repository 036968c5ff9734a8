"""Where rows come from, as other tools name it, made to what `data.train` and `data.eval` take."""

import re
from dataclasses import dataclass, field, replace
from typing import Any

from topwork.run.importing.draft import Draft

_SPLIT = re.compile(r"(\w+)\[:(\d+)\]")
_SLICE = re.compile(r"(\w+)\[.*\]")
_PLACES = (".path", ".split", ".name", ".source", ".data_files", "max_samples")
LOADERS = ("json", "csv", "parquet", "text", "arrow", "pandas")
"""Names that `load_dataset` takes for local files, in place of a data set's."""


@dataclass
class Source:
    """Rows of one place. `keys` are theirs that told of it; `format` None is recognised from the rows."""

    path: str
    split: str | None = None
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    system: str | None = None
    max_rows: int | None = None
    weight: float | None = None
    keys: tuple[str, ...] = ()

    def as_value(self) -> Any:
        """As a recipe takes it: a path alone, where nothing else is said."""
        given = {
            name: value
            for name in ("split", "format", "columns", "system", "weight", "max_rows")
            if (value := getattr(self, name))
        }
        return {"path": self.path, **given} if given else self.path


def put_sources(draft: Draft, ours: str, sources: list[Source]) -> None:
    """`data.train` or `data.eval`; a format or columns that all share stand in `data`."""
    keys = [key for source in sources for key in source.keys]
    if ours == "data.train":
        for name in ("format", "columns"):
            shared = getattr(sources[0], name)
            if shared and all(getattr(source, name) == shared for source in sources):
                draft.put(f"data.{name}", shared, *(key for key in keys if not key.endswith(_PLACES)))
                sources = [_without(source, name) for source in sources]
    elif "data.format" in draft.values:
        sources = [
            replace(source, format=None) if source.format == draft.values["data.format"] else source
            for source in sources
        ]
    values = [source.as_value() for source in sources]
    draft.put(ours, values[0] if len(values) == 1 else values, *keys)


def _without(source: Source, name: str) -> Source:
    return replace(source, format=None) if name == "format" else replace(source, columns={})


def place(path: str, name: str | None = None, files: Any = None) -> list[str]:
    """Paths of `load_dataset(path, name, data_files=files)` as a recipe names them."""
    if files:
        named = [file for each in (files.values() if isinstance(files, dict) else [files]) for file in _listed(each)]
        return named if path in LOADERS else [f"{path.rstrip('/')}/{file}" for file in named]
    return [f"{path}:{name}" if name else path]


def _listed(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def cut(draft: Draft, key: str, split: str | None) -> tuple[str | None, int | None]:
    """A split's name and how many of its rows are read: `train[:1000]`. Other slices are told."""
    if split is None:
        return None, None
    first = _SPLIT.fullmatch(split)
    if first:
        return first[1], int(first[2])
    sliced = _SLICE.fullmatch(split)
    if sliced:
        draft.note(key, "the whole split is read: of a slice only the first rows (max_rows) have an equal")
        return sliced[1], None
    return split, None


def is_placeholder(path: str) -> bool:
    """Whether it stands for a path that is to be filled in: `/path/to/data`, `<path>`."""
    return path.startswith(("<", "/path/", "path/to", "/your", "your")) or "path_to" in path or "path/to" in path


def need_data(draft: Draft, key: str, why: str) -> None:
    """Says that there is no training data."""
    draft.missing.append(f"data.train: {why} ({key}); name a file, a folder or a Hub data set")
