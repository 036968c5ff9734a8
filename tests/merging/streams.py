"""Both ways to merge, over the same base and adapter: in memory, and tensor by tensor from a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from adapters.toy import WITH_TOY
from reference.families import randomise, tiny_model
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, SavedAdapter, load_adapter, read_adapter, write_adapter
from topwork.merging.rounding import Rounding
from topwork.merging.stream import merged_lazily
from topwork.models.base import Base
from topwork.models.lazy import LazyModel, in_type, open_lazily
from topwork.models.lazy_writing import write_lazily
from topwork.models.load import as_base
from topwork.models.skeleton import skeleton
from topwork.models.source import Source


def stored_base(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, shards: str = "5GB", **values: Any
) -> Path:
    """A tiny random model as a folder."""
    tiny_model(family, **values).to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """By plain transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def loaded_base(folder: Path, dtype: torch.dtype = torch.float32) -> Base:
    """As a frozen base, without a tokenizer."""
    return as_base(loaded(folder, dtype), None, "tiny", lambda _: None)  # type: ignore[arg-type]


def trained(base: Base, folder: Path, config: AdapterConfig) -> SavedAdapter:
    """An adapter whose every tensor changes something, as it is on disk."""
    adapters = Adapters(base.module, methods=WITH_TOY)
    adapters.add("a", config)
    randomise(adapters, "a")
    write_adapter(folder, adapters, "a", BaseId("tiny"))
    adapters.remove("a")
    return read_adapter(folder, WITH_TOY)


def grafted(base: Base, saved: SavedAdapter) -> Adapters:
    """An adapter from disk in a base, as `a`."""
    adapters = Adapters(base.module, methods=WITH_TOY)
    load_adapter(adapters, "a", saved, BaseId("tiny"))
    return adapters


def source(folder: Path) -> Source:
    """A folder as a base."""
    return Source("tiny", str(folder), None)


def opened(folder: Path, dtype: torch.dtype) -> tuple[LazyModel, PreTrainedModel]:
    """A folder's tensors in a type, and its skeleton."""
    bare = skeleton(AutoConfig.from_pretrained(folder), dtype=dtype)
    return in_type(open_lazily(source(folder)), bare, dtype), bare


def streamed(
    folder: Path, saved: SavedAdapter, out: Path, dtype: torch.dtype = torch.float32, rounding: Rounding | None = None
) -> Path:
    """Merged tensor by tensor into a new folder."""
    out.mkdir()
    write_lazily(merged_lazily(*opened(folder, dtype), saved, rounding, WITH_TOY), out)
    return out


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Bit for bit, types included."""
    assert found.keys() == expected.keys()
    apart = [key for key, tensor in expected.items() if not _same(found[key], tensor)]
    assert not apart, apart


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
