"""Writing a model that is not in memory: config, generation config and safetensors, one tensor at a time.

8 bytes         the header's length N, little-endian
N bytes         JSON: {"__metadata__": …, name: {"dtype", "shape", "data_offsets"}}, spaces up to a multiple of 8
the tensors     their bytes, row by row, one after the other
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from topwork.common.errors import RunError
from topwork.common.files import write_json
from topwork.models.lazy import LazyModel, LazyTensor
from topwork.models.shards import TYPES

SHARD_BYTES = 5 * 10**9
_CALLED = {dtype: name for name, dtype in TYPES.items()}


def write_lazily(model: LazyModel, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model into an existing folder as transformers reads it. No more than one tensor is in memory at a time;
    one that is larger than `shard_bytes` has a shard of its own. Raises RunError for a tensor that is not as promised,
    and OSError where the disk is full."""
    write_json(folder / "config.json", model.config)
    if model.generation:
        write_json(folder / "generation_config.json", model.generation)
    shards = _shards(model.tensors, shard_bytes)
    names = _file_names(len(shards))
    for name, shard in zip(names, shards):
        write_tensors(folder / name, shard)
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards) for key in shard}
        write_json(
            folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": model.nbytes}, "weight_map": places}
        )  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """A safetensors file of some tensors, each fetched when it is written."""
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in tensors.items():
        header[key] = _entry(tensor, start)
        start += tensor.nbytes
    told = json.dumps(header, separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)
    with open(path, "wb") as file:
        file.write(len(told).to_bytes(8, "little"))
        file.write(told)
        for key, promise in tensors.items():
            file.write(_bytes(key, promise))


def _entry(tensor: LazyTensor, start: int) -> dict[str, Any]:
    return {
        "dtype": _CALLED[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, start + tensor.nbytes]
    }  # fmt: skip


def _bytes(key: str, promise: LazyTensor) -> memoryview:
    seen = promise.view() if promise.view is not None else None  # what passes through as it is needs no copy
    tensor: Tensor = seen if seen is not None and seen.dtype == promise.dtype else promise.fetch()
    if tuple(tensor.shape) != promise.shape or tensor.dtype != promise.dtype:
        raise RunError(
            f"{key} came as {tensor.dtype} {tuple(tensor.shape)}, and {promise.dtype} {promise.shape} was promised; do "
            "the weights' files and config.json belong to one model?"
        )
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _shards(tensors: Mapping[str, LazyTensor], most: int) -> list[dict[str, LazyTensor]]:
    shards: list[dict[str, LazyTensor]] = [{}]
    held = 0
    for key, tensor in tensors.items():
        if shards[-1] and held + tensor.nbytes > most:
            shards.append({})
            held = 0
        shards[-1][key] = tensor
        held += tensor.nbytes
    return shards


def _file_names(count: int) -> Sequence[str]:
    if count == 1:
        return [SAFE_WEIGHTS_NAME]
    stem, _, ending = SAFE_WEIGHTS_NAME.partition(".")
    return [f"{stem}-{number:05}-of-{count:05}.{ending}" for number in range(1, count + 1)]
