"""A whole model that is not in memory: its tensors are fetched one at a time, when they are asked for.

Merging and exporting work on this, so that they need the memory of one tensor, whatever the model's size.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from topwork.common.errors import ModelError
from topwork.common.os_errors import why
from topwork.models.quantized import check_quantization, written_here
from topwork.models.shards import PackedPromise, Promise, promised, weight_files
from topwork.models.skeleton import skeleton
from topwork.models.source import Source
from topwork.models.stored_names import parameter_types, stored_names
from topwork.models.tokenizer import load_config
from topwork.ops.packed import PackedInt8


@dataclass(frozen=True)
class LazyTensor:
    """A tensor's shape and type, and how to get it: `fetch` gives memory of the caller's own. Where it can be looked at
    without reading all of it, `view` gives it in the file's pages and in the file's type, of which `cast` says that it
    is another than `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[], Tensor]
    view: Callable[[], Tensor] | None = None
    cast: bool = False

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The same in another type. One that was cast before has lost what the file's view would show."""
        if dtype == self.dtype:
            return self
        view = None if self.cast else self.view
        return replace(self, dtype=dtype, fetch=lambda: self.fetch().to(dtype), view=view, cast=True)


@dataclass(frozen=True)
class LazyModel:
    """A model as its files have it.

    name         what people call it
    fingerprint  of the base's weights before anything was merged, where it is known
    config       config.json's values
    tensors      by the names that a Hugging Face checkpoint has, in the files' order; dense ones
    generation   generation_config.json's values, or none
    folder       where the other files lie (tokenizer, code of the model's own), where there is a folder
    """

    name: str
    fingerprint: str | None
    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    generation: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def nbytes(self) -> int:
        """What all its tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_lazily(
    source: Source, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> LazyModel:  # fmt: skip
    """The model of a folder or a Hub id, no weight read. A packed checkpoint's tensors come dense, in `dtype`, or in
    the type that its config names. Raises ModelError."""
    try:
        place = cached_file(source.folder, "config.json", revision=source.revision)
        files = weight_files(source.folder, source.revision)
        config = _values(place)
    except OSError as error:
        raise ModelError(f"{source.name} has no config.json, or no weights in safetensors: {why(error)}") from error
    check_quantization(config.get("quantization_config"), source.name)
    generation = cached_file(
        source.folder, "generation_config.json", revision=source.revision, _raise_exceptions_for_missing_entries=False
    )
    promises = promised(files)
    tensors = {key: _plain(promise) for key, promise in promises.items() if isinstance(promise, Promise)}
    if len(tensors) < len(promises):
        tensors = _unpacked(source, promises, dtype or _type_of(config), trust_remote_code)
        config.pop("quantization_config", None)
    return LazyModel(
        name=source.name,
        fingerprint=written_here(source.folder),
        config=config,
        tensors=tensors,
        generation=_values(generation) if generation is not None else {},
        folder=Path(str(place)).parent,
    )


def in_type(model: LazyModel, bare: PreTrainedModel, dtype: torch.dtype) -> LazyModel:
    """A model's floating-point tensors as it has them when it is read in `dtype`, in which `bare`, its skeleton, was
    made: what its family keeps in fp32 stays so."""
    names = {key: name for name, key in stored_names(bare, model.tensors).keys.items()}
    types = parameter_types(bare, dtype)

    def cast(key: str, tensor: LazyTensor) -> LazyTensor:
        return tensor.to(types.get(names.get(key, ""), dtype)) if tensor.dtype.is_floating_point else tensor

    tensors = {key: cast(key, tensor) for key, tensor in model.tensors.items()}
    return replace(model, tensors=tensors, config=_with_type(model.config, dtype))


def tie_as_stored(bare: PreTrainedModel, model: LazyModel) -> None:
    """Take the tie off a skeleton whose files hold a head beside another embedding, as transformers does."""
    head, embedding = bare.get_output_embeddings(), bare.get_input_embeddings()
    if head is None or embedding is None or head.weight is not embedding.weight:
        return
    names = stored_names(bare, model.tensors).keys
    named = [name for name, p in bare.named_parameters(remove_duplicate=False) if p is head.weight]
    stored = [model.tensors[names[name]] for name in named if name in names]
    if len(stored) == 2 and not torch.equal(*(tensor.fetch() for tensor in stored)):
        head.weight = nn.Parameter(embedding.get_parameter("weight").detach(), requires_grad=False)


def _plain(promise: Promise) -> LazyTensor:
    return LazyTensor(promise.shape, promise.dtype, partial(promise.__getitem__, ...), promise.view)


def _unpacked(
    source: Source, promises: dict[str, Any], dtype: torch.dtype, trust_remote_code: bool
) -> dict[str, LazyTensor]:
    """With the packed weights dense, and turned where the model holds them turned."""
    config: Any = load_config(source, trust_remote_code)
    vars(config).pop("quantization_config", None)
    bare = skeleton(config, trust_remote_code)
    paths = {key: name.removesuffix(".weight") for name, key in stored_names(bare, promises).keys.items()}

    def one(key: str, promise: Promise | PackedPromise) -> LazyTensor:
        if isinstance(promise, Promise):
            return _plain(promise)
        if key not in paths:
            raise ModelError(f"{source.name} holds {key!r} in few bits, and this model has no such linear layer")
        turned = isinstance(bare.get_submodule(paths[key]), Conv1D)

        def fetch() -> Tensor:
            packed = promise[...].packed
            if isinstance(packed, PackedInt8):  # its files do not say which type it was packed from
                packed = replace(packed, dtype=dtype)
            dense = packed.dense().to(dtype)
            return dense.t().contiguous() if turned else dense

        return LazyTensor(tuple(bare.get_parameter(f"{paths[key]}.weight").shape), dtype, fetch)

    return {key: one(key, promise) for key, promise in promises.items()}


def _values(place: Any) -> dict[str, Any]:
    try:
        values = json.loads(Path(place).read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{place} is not JSON ({error}); fetch the model anew") from error
    if not isinstance(values, dict):
        raise ModelError(f"{place} holds no JSON object; fetch the model anew")
    return values


TYPE_KEYS = ("dtype", "torch_dtype")


def _type_of(config: dict[str, Any]) -> torch.dtype:
    """The type that a config names; of a composite one, its text part's."""
    text = config.get("text_config") or {}
    named = next((part[key] for part in (config, text) for key in TYPE_KEYS if part.get(key)), "float32")
    found = getattr(torch, str(named), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _with_type(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config that names another type, in its parts too."""
    said = str(dtype).removeprefix("torch.")

    def told(values: dict[str, Any]) -> dict[str, Any]:
        inner = {key: told(value) if isinstance(value, dict) else value for key, value in values.items()}
        return inner | {key: said for key in TYPE_KEYS if key in inner}

    found = told(config)
    return found if any(key in found for key in TYPE_KEYS) else found | {"dtype": said}
