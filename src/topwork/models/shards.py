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
from topwork.common.mapped import let_go
from topwork.common.memory import out_of_memory
from topwork.common.os_errors import why
from topwork.ops.packed import Packed
from topwork.quantization.bnb_format import from_tensors, layer_of

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""What safetensors calls torch's types."""


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
        """A tensor in memory of its own; the file's pages are let go of. Raises ModelError for a file that is cut short
        or not safetensors."""
        there = self.view(path, key)
        copied = there.clone()
        let_go([(there.data_ptr(), there.data_ptr() + there.nbytes)])
        return copied

    def view(self, path: str, key: str) -> Tensor:
        """A tensor in the file's pages, of which those are read that are looked at. Raises ModelError as `fetch`."""
        try:
            if path != self.path:
                self.opened, self.path = None, None
                self.opened, self.path = safe_open(path, framework="pt"), path
            return self.opened.get_tensor(key)
        except (SafetensorError, OSError) as error:
            if out_of_memory(error):
                raise
            raise ModelError(
                f"{path} cannot be read ({why(error)}); was it altered, or the download not finished?"
            ) from error


@dataclass(frozen=True)
class Promise:
    """A tensor on disk; `[...]` fetches it, `view` looks at it where it lies."""

    files: _OpenFiles
    path: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def view(self) -> Tensor:
        """It, in the file's pages."""
        return self.files.view(self.path, self.key)

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
    said: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no dict
                    slices = opened.get_slice(key)
                    at[key] = str(path)
                    said[key] = tuple(slices.get_shape()), _type(key, slices.get_dtype())
        except (SafetensorError, OSError) as error:
            if out_of_memory(error):
                raise
            raise ModelError(
                f"{path} cannot be read ({why(error)}); was it altered, or the download not finished?"
            ) from error
    packed: dict[str, dict[str, tuple[str, str]]] = {}
    for key, path in at.items():
        found = layer_of(key)
        if found is not None:
            packed.setdefault(found[0], {})[found[1]] = (path, key)
    plain = {key: Promise(files, path, key, *said[key]) for key, path in at.items() if layer_of(key) is None}
    for layer, parts in packed.items():
        weight = f"{layer}.weight"
        if weight not in plain:
            raise ModelError(f"{layer} has constants but no codes; the checkpoint was altered or not written whole")
        parts["weight"] = (at[weight], weight)
        plain[weight] = PackedPromise(files, layer, parts)  # type: ignore[assignment]
    return plain


def _type(key: str, name: str) -> torch.dtype:
    if name not in TYPES:
        raise ModelError(f"{key} is stored as {name}, expected one of {', '.join(TYPES)}; give the model in 16 bits")
    return TYPES[name]
