"""What was written of an adapter, read again before anybody else does: a file that says something else than what was
trained would be told nowhere."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from topwork.adapters.config import AdapterConfig
from topwork.adapters.files import Grafted
from topwork.adapters.fitting import plan_on
from topwork.adapters.method import Bare, Method
from topwork.adapters.module import AdapterModule
from topwork.common.errors import AdapterError, RunError

AT_ONCE = 1 << 22
"""Values of a tensor that are read again at a time: 16 MiB in fp32, so that a save takes no more memory for it."""
ROUNDING = 1e-12
"""How far a scale may lie from what was trained, relative to it: PiSSA's is written as that of twice the rank."""


def check_written(
    file: Path, tensors: dict[str, Tensor], config: AdapterConfig, adapter: Grafted[Any], bare: Bare,
    methods: Mapping[str, Method[Any]],
) -> None:  # fmt: skip
    """Raises RunError where the `file` does not hold these `tensors` to the bit, or where `config`, as it was read
    again, does not mean in this base what `adapter` is."""
    with safe_open(file, "pt") as stored:
        keys = set(stored.keys())
        told = next((key for key in sorted(keys ^ tensors.keys())), None)
        told = told or next((key for key, tensor in tensors.items() if not _is_stored(stored, key, tensor)), None)
    if told is not None:
        raise _other(f"{file.name} has another {told} than what was written there")
    if not methods[adapter.config.method].files.types:  # whose options are all in the file
        if config.model_dump(exclude={"init_from"}) != adapter.config.model_dump(exclude={"init_from"}):
            raise _other(f"its options are read as {config!r}")
        return
    try:
        plan = plan_on(bare.for_file(adapter.parts), config, methods)
    except AdapterError as error:
        raise _other(f"its config is refused ({error})") from error
    read = {path: (planned.trained, planned.setting) for path, planned in plan.items()}
    meant = {path: (_learned(part), part.setting) for path, part in adapter.parts.items()}
    for path in [*meant, *read]:
        if path not in read or path not in meant or not _same(read[path], meant[path]):
            raise _other(f"its config means {read.get(path)} values and scale at {path}, where {meant.get(path)} are")


def _learned(part: AdapterModule) -> int:
    """Values of what it learns, as files have it; what stands beside that (VeRA's matrices) is no part of a plan."""
    learned = part.tensors()
    return sum(tensor.numel() for key, tensor in part.state().items() if key in learned)


def _same(read: tuple[int, Any], meant: tuple[int, Any]) -> bool:
    if isinstance(meant[1], float) and isinstance(read[1], float):
        return read[0] == meant[0] and math.isclose(read[1], meant[1], rel_tol=ROUNDING)
    return read == meant


def _is_stored(stored: Any, key: str, tensor: Tensor) -> bool:
    """To the bit, NaN too: a run that diverges is saved as it is."""
    if not tensor.dim():
        return _bits_equal(stored.get_tensor(key), tensor)
    lying = stored.get_slice(key)
    if list(lying.get_shape()) != list(tensor.shape):
        return False
    step = max(1, AT_ONCE // max(1, tensor[:1].numel()))
    return all(_bits_equal(lying[at : at + step], tensor[at : at + step]) for at in range(0, len(tensor), step))


def _bits_equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8)
    )


def _other(told: str) -> RunError:
    return RunError(
        f"what was written of the adapter is not what was trained: {told}. It was not kept; this is a defect of the "
        "disk or of Topwork"
    )
