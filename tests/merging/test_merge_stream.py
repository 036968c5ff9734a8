"""Merged tensor by tensor is merged in memory, bit for bit, whatever the method and the family."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.sheet import ROWS, lora
from merging.streams import assert_same, grafted, loaded, loaded_base, stored_base, streamed, trained
from topwork.adapters.config import AdapterConfig
from topwork.common.errors import AdapterError
from topwork.merging.merge import merge

MERGED = [name for name, row in ROWS.items() if row.merges and row.dense]
HEADS: dict[str, tuple[str, dict[str, Any], AdapterConfig]] = {
    "tied, head saved": ("qwen2", {"tie_word_embeddings": True}, lora(modules_to_save=["lm_head"])),
    "tied, embedding saved": ("qwen2", {"tie_word_embeddings": True}, lora(modules_to_save=["embed_tokens"])),
    "tied, both saved": ("qwen2", {"tie_word_embeddings": True}, lora(modules_to_save=["embed_tokens", "lm_head"])),
    "gpt2, head saved": ("gpt2", {}, lora(target_modules=["c_attn"], modules_to_save=["lm_head"])),
    "gemma2, head saved": ("gemma2", {}, lora(target_modules=["down_proj"], modules_to_save=["lm_head"])),
    "full but the head": (
        "qwen2",
        {"tie_word_embeddings": True},
        AdapterConfig(method="full", exclude_modules=["lm_head"]),
    ),
}  # fmt: skip
FAMILIES = (
    "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "phi", "gpt_neox", "opt", "olmo2", "granite",
    "mixtral", "qwen3_moe", "smollm3", "cohere2", "stablelm",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MERGED)
def test_every_method(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    row = ROWS[name]
    compare(tmp_path, row.family, row.values, row.config, dtype)


@pytest.mark.parametrize("case", HEADS)
def test_heads_that_leave_their_embedding(case: str, tmp_path: Path) -> None:
    family, values, config = HEADS[case]
    folder = compare(tmp_path, family, values, config, torch.bfloat16)
    assert not loaded(folder).config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    compare(tmp_path, family, {}, lora(exclude_modules=["router", "gate"]), torch.bfloat16)


def compare(place: Path, family: str, values: dict[str, Any], config: AdapterConfig, dtype: torch.dtype) -> Path:
    """Merge in both ways; returns the streamed folder."""
    folder = stored_base(place / "base", family, dtype, shards="40kB", **values)
    base = loaded_base(folder, dtype)
    saved = trained(base, place / "adapter", config)
    merge(base, grafted(base, saved), "a")
    out = streamed(folder, saved, place / "out", dtype)
    found = loaded(out, dtype)
    assert found.config.tie_word_embeddings == base.module.config.tie_word_embeddings
    assert_same(found.state_dict(), base.module.state_dict())
    return out


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.merges])
def test_what_cannot_be_merged_is_refused_by_name(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    folder = stored_base(tmp_path / "base", row.family, **row.values)
    saved = trained(loaded_base(folder), tmp_path / "adapter", row.config)
    with pytest.raises(AdapterError, match="prefix and prompt tuning cannot be merged"):
        streamed(folder, saved, tmp_path / "out")
