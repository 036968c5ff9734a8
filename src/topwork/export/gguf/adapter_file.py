"""A GGUF adapter as llama.cpp reads it, whoever wrote it: the update of each weight of the base's file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from topwork.adapters.lowrank import LowRankUpdate
from topwork.common.errors import AdapterError, ModelError, quoted
from topwork.common.os_errors import why
from topwork.export.gguf.adapter import EMBEDDING
from topwork.export.gguf.families import family_of, gguf_name, rotary_heads
from topwork.export.gguf.package import gguf_package
from topwork.export.lowered import Lowered
from topwork.quantization.kinds import EMBEDDINGS, embedding_shape, features

_A, _B = ".lora_a", ".lora_b"


@dataclass(frozen=True)
class GgufUpdate:
    """A [r, in] (the embedding's [r, V]) and B [out, r] (the embedding's [d, r]), fp32, and the scale of their product
    when a user's own scale is 1."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class GgufAdapter:
    """What stands in the file: `updates` by the names of the base's weights (`blk.0.attn_q.weight`)."""

    architecture: str
    name: str | None
    alpha: float
    updates: dict[str, GgufUpdate]


def read_gguf_adapter(path: Path) -> GgufAdapter:
    """Raises AdapterError for a file that is damaged, no LoRA adapter, or one that llama.cpp would refuse."""
    reader = open_gguf(path)
    kind, form = field(reader, "general.type", ""), field(reader, "adapter.type", "")
    if kind != "adapter" or form != "lora":
        raise AdapterError(
            f"{path} holds a GGUF {quoted(kind or 'model')}{f' of type {quoted(form)}' if form else ''}, expected an "
            "adapter of type 'lora'"
        )
    if invoked := field(reader, "adapter.alora.invocation_tokens", []):
        raise AdapterError(f"{path} is an aLoRA, active only behind the tokens {invoked}; that cannot be read")
    alpha = float(field(reader, "adapter.lora.alpha", 0.0))
    tensors = {tensor.name: _values(tensor) for tensor in reader.tensors}
    architecture = str(field(reader, "general.architecture", ""))
    updates = {name: _update(path, name, tensors, alpha) for name in _bases(path, tensors)}
    return GgufAdapter(architecture, field(reader, "general.name", None), alpha, updates)


def open_gguf(path: Path) -> Any:
    """gguf's reader. Raises AdapterError for a file that is cut short or none."""
    try:
        return gguf_package().GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise AdapterError(f"{path} is cut short, damaged or no GGUF file ({why(error)}); fetch it again") from error


def field(reader: Any, key: str, default: Any) -> Any:
    """A key's value, or the default where the file lacks it."""
    found = reader.get_field(key)
    return default if found is None else found.contents()


def _values(tensor: Any) -> Tensor:
    gguf = gguf_package()
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))


def _bases(path: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    other = [name for name in tensors if not name.endswith((_A, _B))]
    if other or not tensors:
        told = f"holds {quoted(other[0])} (…{_A} and …{_B} were expected)" if other else "holds no tensors"
        raise AdapterError(f"{path} {told}; llama.cpp would not load it either")
    return list(dict.fromkeys(name[: -len(_A)] for name in tensors))


def _update(path: Path, name: str, tensors: Mapping[str, Tensor], alpha: float) -> GgufUpdate:
    a, b = tensors.get(name + _A), tensors.get(name + _B)
    if a is None or b is None:
        raise AdapterError(f"{path}: {name} has {'no ' + (_A if a is None else _B)}; both are needed")
    if name == EMBEDDING:
        a = a.T.contiguous()
    if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
        raise AdapterError(f"{path}: {name} has A {tuple(a.shape)} and B {tuple(b.shape)}, which are no product")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterError(f"{path}: {name} holds values that are not finite (NaN or infinity)")
    return GgufUpdate(a, b, alpha / b.shape[1] if alpha else 1.0)


def lowered_of(
    path: Path, adapter: GgufAdapter, config: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> Lowered:
    """An adapter that was read, as it goes into a Hugging Face model: paths for names, q's and k's rows as transformers
    has them, the scale in B, one rank.

    config, modules  the base's config.json and its modules by path, a skeleton's will do

    Raises AdapterError where the adapter is another base's.
    """
    architecture = family_of(config).architecture
    if adapter.architecture != architecture:
        raise AdapterError(
            f"{path} is for the architecture {quoted(adapter.architecture)}, and this base's is {architecture!r}; name "
            "its own base with --model"
        )
    places = _places(config, modules)
    unknown = [name for name in adapter.updates if name not in places]
    if unknown:
        raise AdapterError(f"{path} has an update of {quoted(unknown[0])}, which this base has not; is it another's?")
    rank = max(len(update.a) for update in adapter.updates.values())
    found = {
        places[name]: _as_transformers(path, places[name], update, config, modules[places[name]]).padded(rank)
        for name, update in adapter.updates.items()
    }
    return Lowered({place: found[place] for place in modules if place in found}, rank)


def reread(path: Path, wanted: Lowered, config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> float:
    """Read a file again that was to hold `wanted`. Returns the largest difference of a factor's values, relative to its
    largest; 0 in f32."""
    found = lowered_of(path, read_gguf_adapter(path), config, modules)
    if found.updates.keys() != wanted.updates.keys() or found.rank != wanted.rank:
        return float("inf")
    pairs = [(found.updates[place], update) for place, update in wanted.updates.items()]
    return max(_apart(one, other) for mine, theirs in pairs for one, other in ((mine.a, theirs.a), (mine.b, theirs.b)))


def _apart(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def _places(config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The names that a GGUF file of the base has for its weights -> the paths of their modules."""
    architecture, blocks = family_of(config).architecture, int(config["num_hidden_layers"])
    found = {}
    for path, module in modules.items():
        if isinstance(getattr(module, "weight", None), Tensor):
            try:
                found[gguf_name(architecture, blocks, f"{path}.weight")] = path
            except ModelError:  # no weight of a GGUF file, so nothing can be for it
                continue
    return found


def _as_transformers(
    path: Path, place: str, update: GgufUpdate, config: Mapping[str, Any], module: nn.Module
) -> LowRankUpdate:
    embedding = isinstance(module, EMBEDDINGS)
    inputs, outputs = embedding_shape(module) if embedding else features(module)
    if (update.a.shape[1], len(update.b)) != (inputs, outputs):
        raise AdapterError(
            f"{path}: the update of {place} is for {update.a.shape[1]} inputs and {len(update.b)} outputs, and this "
            f"base's is {inputs} and {outputs}; is it another base's?"
        )
    heads = None if embedding else rotary_heads(config, f"{place}.weight")
    b = update.b if heads is None else unpermuted(update.b, heads)
    return LowRankUpdate(update.a, update.scaling * b, update.scaling, embedding)


def unpermuted(rows: Tensor, heads: int) -> Tensor:
    """What undoes `permuted`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)
