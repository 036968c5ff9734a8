"""A safetensors file that a stranger may have written: every number in it is checked before anything follows it.

    8 bytes   the header's length n, little-endian
    n bytes   JSON: {name: {"dtype": …, "shape": […], "data_offsets": [begin, end]}, …, "__metadata__": {…}}
    the rest  the tensors' bytes, one behind the other without holes

It is read once, from one open file, so that what was checked is what is used.
"""

import io
import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topwork.adapters.foreign_json import json_object
from topwork.adapters.other_makes import told_pointer
from topwork.common.errors import AdapterError, quoted

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""What an adapter's numbers may be; whole numbers are none."""
MOST_AXES = 8


@dataclass(frozen=True)
class ReadLimits:
    """How large what strangers send may be."""

    config_bytes: int = 1 << 20
    header_bytes: int = 16 << 20
    tensor_bytes: int = 4 << 30
    tensors: int = 100_000


@dataclass(frozen=True)
class _Entry:
    """One tensor's place in the bytes behind the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def open_within(path: Path, within: Sequence[Path] | None) -> io.FileIO:
    """An ordinary file, opened to be read; a link may lead to one inside of the folders `within` (None: anywhere).

    Raises FileNotFoundError, or AdapterError naming what it is instead; no message tells where it stands.
    """
    try:
        real = path.resolve(strict=True)
    except (RuntimeError, OSError) as error:  # links in a ring
        raise FileNotFoundError(path.name) from error
    if within is not None and not any(real.is_relative_to(root.resolve()) for root in within):
        raise AdapterError(f"{path.name} is a link that leads out of the folders that adapters are read from")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = io.FileIO(os.open(real, flags))
    except OSError as error:
        raise AdapterError(f"{path.name} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise AdapterError(f"{path.name} is no ordinary file")
    return file


def read_tensors(file: io.FileIO, limits: ReadLimits = ReadLimits()) -> dict[str, Tensor]:
    """Every tensor of an open safetensors file, in a memory of their own. Raises AdapterError naming what is wrong."""
    size = os.fstat(file.fileno()).st_size
    if size > limits.tensor_bytes:
        raise AdapterError(f"the file has {size:,} bytes, and at most {limits.tensor_bytes:,} are read")
    first = bytes(_exactly(file, 8))
    if (told := told_pointer("it", first)) is not None:
        raise AdapterError(told)
    length = int.from_bytes(first, "little")
    if length > min(limits.header_bytes, size - 8):
        raise AdapterError(
            f"the header claims {length:,} bytes, in a file of {size:,}; at most {limits.header_bytes:,} are read"
        )
    header = json_object(bytes(_exactly(file, length)), "the header")
    entries = _entries(header, size - 8 - length, limits)
    data = _exactly(file, size - 8 - length)
    found = {entry.name: _tensor(data, entry) for entry in entries}
    for name, tensor in found.items():
        if not torch.isfinite(tensor.float()).all():
            raise AdapterError(f"{quoted(name)} holds values that are not finite (NaN or infinity)")
    return found


def _exactly(file: io.FileIO, count: int) -> bytearray:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = file.readinto(view[done:])
        if not got:
            raise AdapterError(f"the file ends {count - done:,} bytes too early")
        done += got
    return data


def _entries(header: dict[str, Any], data_bytes: int, limits: ReadLimits) -> list[_Entry]:
    """The tensors in the order of their bytes, which they share out without holes or overlaps."""
    header.pop("__metadata__", None)
    if not header or len(header) > limits.tensors:
        raise AdapterError(f"the file has {len(header):,} tensors; expected 1 to {limits.tensors:,}")
    entries = sorted(
        (_entry(name, value, data_bytes) for name, value in header.items()), key=lambda e: (e.begin, e.end)
    )
    at = 0
    for entry in entries:
        if entry.begin != at:
            told = "overlaps the one before it" if entry.begin < at else "leaves a hole before it"
            raise AdapterError(f"{quoted(entry.name)} begins at byte {entry.begin:,}, which {told}")
        at = entry.end
    if at != data_bytes:
        raise AdapterError(f"{data_bytes - at:,} bytes at the file's end belong to no tensor")
    return entries


def _entry(name: str, value: Any, data_bytes: int) -> _Entry:
    called = quoted(name)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(f"{called} has no dtype, shape and data_offsets, which a tensor has")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise AdapterError(f"{called} is of type {quoted(value['dtype'])}; expected {', '.join(DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2 or len(shape) > MOST_AXES:
        raise AdapterError(f"{called} has a shape or data_offsets that are no short lists of whole numbers")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise AdapterError(f"{called} claims the bytes {begin} to {end} of {data_bytes:,}")
    if 0 in shape and begin == end and math.prod(side or 1 for side in shape) < 1 << 62:
        # what empty ones come from is told where all are known (`on_base.py`)
        return _Entry(name, dtype, tuple(shape), begin, end)
    needed = dtype.itemsize
    for side in shape:
        needed *= side
        if not 0 < needed <= data_bytes:
            raise AdapterError(f"{called} has the shape {quoted(shape)}, for which the file has no bytes")
    if needed != end - begin:
        raise AdapterError(
            f"{called} has {end - begin:,} bytes, and its type and shape {quoted(shape)} take {needed:,}"
        )
    return _Entry(name, dtype, tuple(shape), begin, end)


def _whole(values: Any) -> bool:
    """A list of whole numbers from zero on, none of them absurd."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _tensor(data: bytearray, entry: _Entry) -> Tensor:
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    size = entry.dtype.itemsize
    if entry.begin % size:  # no number of this type may begin there
        data, begin = data[entry.begin : entry.end], 0
    else:
        begin = entry.begin
    flat = torch.frombuffer(data, dtype=entry.dtype, count=(entry.end - entry.begin) // size, offset=begin)
    return flat.view(entry.shape)
