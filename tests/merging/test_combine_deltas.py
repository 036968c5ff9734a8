"""What an adapter changes, in factors or dense, is what PEFT's merge changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from merging.adapters_of import CASES, changes, dense, write_one
from reference.combining import furthest, peft_deltas
from reference.families import tiny_base, tiny_model
from topwork.common.errors import AdapterError
from topwork.merging.deltas import LowRankDelta

FULL_RANK = ("dora", "ia3")


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"tokens"}))
def test_deltas_are_those_of_peft(case: str, tmp_path: Path) -> None:
    found = changes(write_one(tmp_path, tiny_base(), CASES[case]), tiny_base())
    expected = {name: delta for name, delta in peft_deltas(tmp_path, tiny_model("llama")).items() if delta.any()}
    ours = dense(found)
    assert ours.keys() == expected.keys()
    assert furthest(ours, expected) <= 1e-6
    factors = [isinstance(found.delta(path), LowRankDelta) for path in found.adapted]
    assert all(factors) if case not in FULL_RANK else not any(factors)
    if case not in FULL_RANK:
        assert found.rank == max(found.delta(path).rank for path in found.adapted)


@pytest.mark.parametrize("options", [{"r": 4}, {"r": 4, "use_dora": True}], ids=["lora", "dora"])
def test_turned_weights_are_too(options: dict[str, Any], tmp_path: Path) -> None:
    found = changes(write_one(tmp_path, tiny_base("gpt2"), options), tiny_base("gpt2"))
    expected = {name: delta for name, delta in peft_deltas(tmp_path, tiny_model("gpt2")).items() if delta.any()}
    assert furthest(dense(found), expected) <= 1e-6


def test_trained_rows_are_their_distance_from_the_base(tmp_path: Path) -> None:
    found = changes(write_one(tmp_path, tiny_base(), CASES["tokens"]), tiny_base())
    expected = peft_deltas(tmp_path, tiny_model("llama"))["model.embed_tokens.weight"]
    rows = found.of_tokens()
    assert sorted(rows) == expected.abs().sum(1).nonzero().flatten().tolist() == [5, 17, 40]
    for token, row in rows.items():
        torch.testing.assert_close(row.double(), expected[token], rtol=0, atol=1e-7)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_began_from_the_base_in_peft_is_found_again(init: str, tmp_path: Path) -> None:
    model, wanted = (
        tiny_model("llama"),
        LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=init),
    )
    adapted = get_peft_model(tiny_model("llama"), wanted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    adapted.save_pretrained(tmp_path)
    merged, path = adapted.merge_and_unload(), "model.layers.0.self_attn.q_proj"
    expected = merged.get_submodule(path).weight.detach().double() - model.get_submodule(path).weight.detach().double()
    delta = changes(tmp_path, tiny_base()).delta(path)
    assert isinstance(delta, LowRankDelta)
    assert delta.rank == 6
    assert float((delta.dense() - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "prompt", "num_virtual_tokens": 3}, "learned tokens change no weight"),
        ({"method": "prefix", "num_virtual_tokens": 3}, "learned tokens change no weight"),
        ({"method": "full"}, "changes every weight"),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)
def test_what_has_no_delta_is_refused_by_name(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"{tmp_path.name}: .*{told}"):
        changes(write_one(tmp_path, tiny_base(), options), tiny_base())


def test_biases_are_refused(tmp_path: Path) -> None:
    base = tiny_base("qwen2")
    with pytest.raises(AdapterError, match=r"IA3 scales the bias of .*k_proj too"):
        changes(write_one(tmp_path / "ia3", base, {"method": "ia3"}), base)
    with pytest.raises(AdapterError, match="bitfit changes biases alone"):
        changes(write_one(tmp_path / "bitfit", base, {"method": "bitfit"}), base)
