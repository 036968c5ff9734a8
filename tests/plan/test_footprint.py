"""Bytes of weights: by hand for a known shape, and of models that are really held so."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from run import tiny
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.models.skeleton import skeleton
from topwork.plan.built import config_of
from topwork.plan.footprint import as_table, footprint
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import weight_bytes

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("float32", {}),
    "bf16": ("bfloat16", {}),
    "int8": ("bfloat16", {"load_in_8bit": True}),
    "NF4": ("bfloat16", {"load_in_4bit": True, "bnb_4bit_use_double_quant": False}),
    "NF4 + DQ": ("bfloat16", {"load_in_4bit": True}),
}


@pytest.mark.parametrize("tied", [False, True])
def test_computed_is_what_a_loaded_model_holds(tied: bool, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", tie_word_embeddings=tied)
    computed = {row.name: row.total_bytes for row in footprint(skeleton(config_of(str(folder))))}
    for name, (dtype, quantization) in RECIPES.items():
        config = ModelConfig.model_validate({"model_name_or_path": str(folder), "dtype": dtype, "device": "cpu"})
        base = load_base(config, lambda _: None, QuantizationConfig.model_validate(quantization))
        assert weight_bytes(base.module) == computed[name], name
    assert list(computed) == list(RECIPES)


def test_llama_2_7b_by_hand() -> None:
    """32 layers of four 4096 x 4096 and three 4096 x 11008 weights; embedding, head and 65 norms besides."""
    square, wide = 4096 * 4096, 4096 * 11008
    linear = 32 * (4 * square + 3 * wide)
    other = 2 * 32000 * 4096 + 65 * 4096
    nested = sum(n * (n_of // 64 + 4 * (n_of // 64 // 256) + 1024) for n, n_of in ((128, square), (96, wide)))
    expected = {
        "fp32": (4 * linear, 4 * other),
        "bf16": (2 * linear, 2 * other),
        "int8": (linear + 4 * 32 * (4 * 4096 + 2 * 11008 + 4096), 2 * other),
        "NF4": (linear // 2 + 4 * linear // 64, 2 * other),
        "NF4 + DQ": (linear // 2 + nested, 2 * other),
    }
    rows = footprint(skeleton(config_of("llama-2-7b")))
    assert {row.name: (row.linear_bytes, row.other_bytes) for row in rows} == expected


def test_conv1d_layers_and_a_tied_head() -> None:
    rows = {
        row.name: row
        for row in footprint(
            skeleton(AutoConfig.for_model("gpt2", vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64))
        )
    }
    linear = 3 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
    assert rows["bf16"].linear_bytes == 2 * linear
    assert rows["int8"].linear_bytes == linear + 4 * 3 * (96 + 32 + 128 + 32)
    biases, norms = 3 * (96 + 32 + 128 + 32), 7 * 2 * 32
    assert rows["NF4"].other_bytes == 2 * (97 * 32 + 64 * 32 + biases + norms)


def test_the_table_has_a_line_for_every_type() -> None:
    lines = as_table(footprint(skeleton(config_of("llama-3-70b")))).splitlines()
    assert [line[:16].strip() for line in lines[1:]] == list(RECIPES)
    assert lines[2].endswith("100.0%")
