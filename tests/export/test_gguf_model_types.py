"""The types: what they hold, where they fall back, and that llama.cpp computes what torch does with their values."""

import gguf
import numpy as np
import pytest
import torch

from export.gguf_models import apart, as_lazy, byte_level, last_logprobs, prompts, tiny, written
from reference.ggml import as_llama_cpp, as_stored
from topwork.common.errors import ModelError, RequestError
from topwork.export.gguf.llama_cpp import LlamaCpp
from topwork.export.gguf.model import write_gguf_model
from topwork.export.gguf.types import TYPES, packed, stored_as, stored_bytes

SMALL = ("q4_0", "q4_1", "q5_0", "q5_1")
SUMS = 2e-5
"""fp32 sums in another order."""


def _stored(model, type):
    """What each weight is in, said a second time: a head of 8 bits where the others have 4 or 5."""
    heads = {"lm_head.weight"} | ({"model.embed_tokens.weight"} if model.config.tie_word_embeddings else set())
    return lambda name: "q8_0" if type in SMALL and name in heads else type


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_llama_cpp_computes_what_torch_computes_with_the_files_values(tmp_path, family, type):
    """Weights as the type holds them, inputs rounded as llama.cpp rounds them. Where an input falls to the other side
    of a rounding the results part, by less than what rounding all inputs does; most prompts meet no such input."""
    values = {"sliding_window": None} if family == "phi3" else {}
    model, given = tiny(family, **values), prompts((1, 2, 3, 4, 5, 6, 7, 8))
    stored = _stored(model, type)
    expected = last_logprobs(as_llama_cpp(model, stored), given)
    without = last_logprobs(as_llama_cpp(model, stored, inputs=False), given)
    rounding = max(float((a - b).abs().max()) for a, b in zip(expected, without))
    found = sorted(apart(LlamaCpp(written(tmp_path, model, type).path, 64), given, expected))
    assert found[2] < SUMS
    assert found[-1] < max(SUMS, rounding) * 2


@pytest.mark.parametrize("type", TYPES)
def test_a_weights_bytes_are_as_many_as_announced_and_hold_its_values(type):
    weight = torch.randn(6, 64)
    data = packed(weight, type, "w")
    assert data.nbytes == stored_bytes((6, 64), type)
    step = {
        "f32": 0.0,
        "f16": 2**-11,
        "bf16": 2**-8,
        "q8_0": 1 / 254,
        "q5_0": 1 / 16,
        "q5_1": 1 / 31,
        "q4_0": 1 / 8,
        "q4_1": 1 / 15,
    }
    largest = weight.unflatten(-1, (2, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(-2)
    wide = (
        2 if type in ("q5_1", "q4_1") else 1
    )  # from the least to the largest value; a fifth for the scale's own rounding
    assert ((as_stored(weight, type) - weight).abs() <= 1.2 * wide * step[type] * largest).all()


def test_vectors_are_fp32_heads_have_eight_bits_and_rows_of_odd_length_fall_back():
    assert stored_as("blk.0.attn_norm.weight", (64,), "q4_0", False).type == "f32"
    assert stored_as("blk.0.attn_q.bias", (64,), "f16", False).type == "f32"
    assert stored_as("output.weight", (99, 64), "q4_0", True).type == "q8_0"
    assert stored_as("output.weight", (99, 64), "q8_0", True).type == "q8_0"
    assert stored_as("blk.0.ffn_up.weight", (96, 64), "q4_0", False).type == "q4_0"
    odd = stored_as("blk.0.ffn_down.weight", (64, 40), "q4_0", False)
    assert odd.type == "f16"
    assert "rows of 40" in odd.why


def test_a_fallback_is_told_and_the_file_still_is_the_model(tmp_path):
    model, told = tiny("llama", intermediate_size=40), []
    found = write_gguf_model(as_lazy(model), byte_level(), None, tmp_path / "x.gguf", "q8_0", told.append)
    assert found.fell_back == {f"blk.{n}.ffn_down.weight": "f16: its rows of 40 are no multiple of 32" for n in (0, 1)}
    assert len(told) == 2
    assert "blk.0.ffn_down.weight is f16" in told[0]
    given = prompts((5, 9))
    expected = last_logprobs(as_llama_cpp(model, lambda name: "f16" if "down_proj" in name else "q8_0"), given)
    assert min(apart(LlamaCpp(found.path, 64), given, expected)) < SUMS


def test_the_files_type_is_the_number_that_llama_cpp_has_for_it(tmp_path):
    for type, number in {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}.items():
        reader = gguf.GGUFReader(written(tmp_path, tiny("llama"), type).path)
        assert reader.get_field("general.file_type").contents() == number
        assert reader.get_field("general.architecture").contents() == "llama"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_is_named(tmp_path, value):
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        written(tmp_path, model, "q8_0")
    assert not list(tmp_path.iterdir())


def test_what_a_float16_does_not_hold_is_refused_and_a_bfloat16_holds_it():
    weight = torch.full((1, 32), 1e5)
    for type in ("f16", "q8_0"):
        with pytest.raises(ModelError, match="beyond float16's 65504"):
            packed(weight, type, "w")
    assert np.isfinite(packed(weight, "bf16", "w")).all()


def test_a_type_that_is_not_written_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(RequestError, match=r"not 'q8'; did you mean 'q8_0'.*llama-quantize"):
        written(tmp_path, tiny("llama"), "q8")
