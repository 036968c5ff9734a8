"""Merged tensor by tensor is merged in memory, bit for bit, whatever the method and the family."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.sheet import ROWS, lora
from merging.streams import assert_same, grafted, loaded, loaded_base, stored_base, streamed, trained
from reference.families import sequences
from topwork.adapters.config import AdapterConfig
from topwork.common.errors import AdapterError
from topwork.merging.merge import merge
from topwork.merging.verify import compare as compare_logits
from topwork.merging.verify import measure

pytestmark = pytest.mark.slow

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
FAMILIES = ("qwen2", "gemma3_text", "phi3", "gpt_neox", "opt", "mixtral", "qwen3_moe", "granite")


@pytest.mark.parametrize("name", MERGED)
def test_every_method(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    compare(tmp_path, row.family, row.values, row.config, torch.bfloat16)


@pytest.mark.parametrize("name", MERGED)
def test_on_a_hundred_inputs_it_answers_as_base_and_adapter_do(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    folder = stored_base(tmp_path / "base", row.family, **row.values)
    base = loaded_base(folder)
    saved = trained(base, tmp_path / "adapter", row.config)
    given = [tokens.tolist() for tokens in sequences([1 + n % 11 for n in range(100)])]
    grafted(base, saved)
    expected = measure(base, given, "a")
    found = compare_logits(
        expected.logits, measure(loaded_base(streamed(folder, saved, tmp_path / "out")), given, None).logits
    )
    moved = compare_logits(expected.logits, measure(base, given, None).logits)
    assert found.largest_relative_difference <= 1e-5 < 1e-3 < moved.largest_relative_difference


def test_what_a_peft_folder_leaves_out_is_found_from_the_weight(tmp_path: Path) -> None:
    """PiSSA and OLoRA as PEFT writes them: A and B alone."""
    for init in ("pissa", "olora"):
        folder = stored_base(tmp_path / init / "base")
        base = loaded_base(folder)
        whole = trained(base, tmp_path / init / "adapter", lora(init_lora_weights=init))
        halves = {
            key: tensor.chunk(2, 1 if key.endswith("lora_B.weight") else 0)[0].clone()
            for key, tensor in whole.tensors.items()
        }
        saved = replace(whole, tensors=halves, config=lora(init_lora_weights=init))
        out = streamed(folder, saved, tmp_path / init / "out")
        merge(base, grafted(base, saved), "a")
        assert_same(loaded(out).state_dict(), base.module.state_dict())


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_stands_beside_a_tied_embedding(equal: bool, tmp_path: Path) -> None:
    """Equal it is a repetition; another one is no tie, whatever the config says."""
    folder = stored_base(tmp_path / "base", tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (1.0 if equal else 1.5)
    save_file(tensors, file, metadata={"format": "pt"})
    base = loaded_base(folder)
    saved = trained(base, tmp_path / "adapter", lora(target_modules=["q_proj"], trainable_token_indices=[3, 50]))
    out = streamed(folder, saved, tmp_path / "out")
    merge(base, grafted(base, saved), "a")
    assert_same(loaded(out).state_dict(), base.module.state_dict())
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) == (not equal)


@pytest.mark.parametrize("case", HEADS)
def test_heads_that_leave_their_embedding(case: str, tmp_path: Path) -> None:
    family, values, config = HEADS[case]
    folder = compare(tmp_path, family, values, config, torch.bfloat16)
    assert not loaded(folder).config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    compare(tmp_path, family, {}, lora(), torch.bfloat16)


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
    with pytest.raises(AdapterError, match="cannot be merged"):
        streamed(folder, saved, tmp_path / "out")
