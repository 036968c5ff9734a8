"""A checkpoint's tensors as promises: fetched one at a time, from one open safetensors file at a time.

A packed weight of a bitsandbytes checkpoint is one promise, under the key of its codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from topwork.common.errors import ModelError
from topwork.ops.packed import Packed
from topwork.quantization.bnb_format import from_tensors, layer_of


@dataclass(frozen=True)
class Ready:
    """A weight that comes packed. transformers moves and casts what it reads; a packed weight only moves."""

    packed: Packed

    def to(self, device: Any = None, dtype: Any = None) -> "Ready":  # noqa: ARG002 - the signature is transformers'
        """On a device."""
        return self if device is None else Ready(self.packed.to(torch.device(device)))


class _OpenFiles:
    """The one safetensors file that is open."""

    def __init__(self) -> None:
        self.path: str | None = None
        self.opened: Any = None

    def fetch(self, path: str, key: str) -> Tensor:
        """A tensor in memory of its own. Raises ModelError for a file that is cut short or not safetensors."""
        try:
            if path != self.path:
                self.opened, self.path = None, None
                self.opened, self.path = safe_open(path, framework="pt"), path
            return self.opened.get_tensor(key).clone()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} cannot be read ({error}); was it altered, or the download not finished?"
            ) from error


@dataclass(frozen=True)
class _Promise:
    """A tensor on disk; `[...]` fetches it."""

    files: _OpenFiles
    path: str
    key: str

    def __getitem__(self, _: Any) -> Tensor:
        tensor = self.files.fetch(self.path, self.key)
        if tensor.dtype in (torch.uint8, torch.int8) and self.key.endswith(".weight"):
            layer = self.key.removesuffix(".weight")  # transformers would take the codes themselves for weights
            raise ModelError(f"{layer} has codes but no constants; the checkpoint was altered or not written whole")
        return tensor


@dataclass(frozen=True)
class PackedPromise:
    """A packed weight on disk: its tensors by part, each with its file."""

    files: _OpenFiles
    layer: str
    parts: dict[str, tuple[str, str]]

    def __getitem__(self, _: Any) -> Ready:
        tensors = {part: self.files.fetch(path, key) for part, (path, key) in self.parts.items()}
        return Ready(from_tensors(self.layer, tensors))


def weight_files(folder: str, revision: str | None = None) -> list[str]:
    """The safetensors files of a folder or a Hub id (fetched where they are not cached), as its index lists them.

    Raises OSError where there are none.
    """
    single = cached_file(folder, SAFE_WEIGHTS_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    if single is not None:  # transformers takes it before an index, where there are both
        return [str(single)]
    index = cached_file(folder, SAFE_WEIGHTS_INDEX_NAME, revision=revision)
    files, _ = get_checkpoint_shard_files(folder, index, revision=revision)
    return [str(file) for file in files]


def promised(paths: Sequence[str]) -> dict[str, Any]:
    """Every weight of some safetensors files by its key; a packed one under its codes' key alone."""
    files = _OpenFiles()
    at: dict[str, str] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as opened:
                at |= dict.fromkeys(opened.keys(), str(path))
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} cannot be read ({error}); was it altered, or the download not finished?"
            ) from error
    packed: dict[str, dict[str, tuple[str, str]]] = {}
    for key, path in at.items():
        found = layer_of(key)
        if found is not None:
            packed.setdefault(found[0], {})[found[1]] = (path, key)
    plain = {key: _Promise(files, path, key) for key, path in at.items() if layer_of(key) is None}
    for layer, parts in packed.items():
        weight = f"{layer}.weight"
        if weight not in plain:
            raise ModelError(f"{layer} has constants but no codes; the checkpoint was altered or not written whole")
        parts["weight"] = (at[weight], weight)
        plain[weight] = PackedPromise(files, layer, parts)  # type: ignore[assignment]
    return plain
