"""Adapters that strangers name or send: where they may lie, and how they are read.

Like `read_adapter`, but that no message tells a path of this machine, that files are opened once and checked before a
number in them is believed (`foreign_tensors.py`, `foreign_json.py`), and that patterns in a config are first tried
where they can be stopped (`foreign_patterns.py`).
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topwork.adapters.foreign_json import json_object
from topwork.adapters.foreign_tensors import ReadLimits, open_within, read_tensors
from topwork.adapters.method import Method
from topwork.adapters.methods.table import METHODS
from topwork.adapters.other_makes import CONFIG, OWN, TENSORS, other_make, told_pointer
from topwork.adapters.peft_format import SavedAdapter, saved_adapter
from topwork.common.errors import AdapterError, UnknownAdapterError, quoted, shortened

MESSAGE_CHARACTERS = 600
LONGEST_PATH = 4096


@dataclass(frozen=True)
class ForeignAdapter:
    """What was read, and `content`: the SHA-256 of what it means (its options and its tensors), whatever it was called
    and wherever it lay."""

    saved: SavedAdapter
    content: str


def allowed_folder(given: str, roots: Sequence[Path]) -> Path:
    """The folder that a client names, by a path inside of one of the `roots`, or relative to one.

    Raises AdapterError for a path that leads out of them, by links too, and UnknownAdapterError where none is there;
    neither tells what lies outside.
    """
    if not given or len(given) > LONGEST_PATH or "\0" in given:
        raise AdapterError(f"{quoted(given)} is no path; give the adapter's folder, relative to one that is allowed")
    if not roots:
        raise AdapterError("no folder is allowed from which adapters may be loaded; whoever runs this has to name one")
    real, inside = [root.resolve() for root in roots], False
    for root in real:
        try:
            place = (root / given).resolve()  # an absolute path stands for itself
            if any(place.is_relative_to(other) for other in real):
                inside = True
                if place.is_dir():
                    return place
        except (OSError, RuntimeError, ValueError):  # links in a ring, names too long, no text
            continue
    if not inside:
        raise AdapterError(f"{quoted(given)} lies outside of the folders that adapters may be loaded from")
    raise UnknownAdapterError(f"there is no folder {quoted(given)} among those that adapters may be loaded from")


def read_foreign(
    folder: Path,
    called: str,
    within: Sequence[Path] | None = None,
    limits: ReadLimits = ReadLimits(),
    methods: Mapping[str, Method[Any]] = METHODS,
) -> ForeignAdapter:
    """Read a PEFT folder, or a run's folder with one in it, that is `called` so in every message.

    within: what its files may be links to must lie in one of these; None asks nothing, for folders that whoever runs
    this has named himself.

    Raises UnknownAdapterError where there is no such folder, AdapterError for everything that is wrong in it.
    """
    try:
        return _read(adapter_folder(folder), called, within, limits, methods)
    except UnknownAdapterError as error:
        raise UnknownAdapterError(_told(called, error)) from None
    except AdapterError as error:
        raise AdapterError(_told(called, error)) from None
    except OSError as error:
        raise AdapterError(f"{called} cannot be read ({error.strerror})") from None


def adapter_folder(folder: Path) -> Path:
    """Of a run's folder the adapter in it; any other is the adapter's own."""
    inner = folder / "adapter"
    return inner if (inner / CONFIG).exists() and not (folder / CONFIG).exists() else folder


def _read(
    folder: Path, called: str, within: Sequence[Path] | None, limits: ReadLimits, methods: Mapping[str, Method[Any]]
) -> ForeignAdapter:
    if not folder.is_dir():
        raise UnknownAdapterError("there is no such folder")
    raw = _json(folder, CONFIG, within, limits.config_bytes)
    own = _json(folder, OWN, within, limits.config_bytes) if os.path.lexists(folder / OWN) else {}
    try:
        with open_within(folder / TENSORS, within) as file:
            tensors = read_tensors(file, limits)
    except FileNotFoundError:
        raise AdapterError(other_make(folder)) from None
    except AdapterError as error:
        raise AdapterError(f"{TENSORS}: {error}") from None
    saved = saved_adapter(raw, tensors, own, called, methods)
    return ForeignAdapter(saved, content_of(saved))


def _json(folder: Path, name: str, within: Sequence[Path] | None, most: int) -> dict[str, Any]:
    try:
        with open_within(folder / name, within) as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise AdapterError(other_make(folder)) from None
    if len(data) > most:
        raise AdapterError(f"{name} has more than {most:,} bytes")
    if (told := told_pointer(name, data)) is not None:
        raise AdapterError(told)
    return json_object(data, name)


def _told(called: str, error: Exception) -> str:
    text = str(error)
    return shortened(text if text.startswith(called) else f"{called}: {text}", MESSAGE_CHARACTERS)


def content_of(saved: SavedAdapter) -> str:
    """`sha256:…` over an adapter's options and its tensors. Lists of names count as sets, in whose order PEFT writes
    them, another one each time; lists of numbers (tokens' ids) have their order, and so have patterns, of which the
    first that matches counts. Raises AdapterError for an option that
    is not finite."""
    options = {name: _meaning(value) for name, value in saved.config.model_dump(exclude={"init_from"}).items()}
    try:
        meaning = json.dumps(options, sort_keys=True, allow_nan=False)
    except ValueError:
        raise AdapterError(f"{CONFIG} holds an option that is not finite") from None
    digest = hashlib.sha256(meaning.encode())
    for name, tensor in sorted(saved.tensors.items()):
        digest.update(f"\n{name!a} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return f"sha256:{digest.hexdigest()}"


def _meaning(value: Any) -> Any:
    if isinstance(value, dict) and list(value) != sorted(value):
        return list(value.items())
    names = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    return sorted(value) if names else value


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
