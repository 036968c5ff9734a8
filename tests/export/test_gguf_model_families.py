"""Each family's logits in llama.cpp are transformers' own; what llama.cpp would compute otherwise is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from export.gguf_models import apart, as_lazy, byte_level, last_logprobs, prompts, tiny, written
from reference.ggml import as_llama_cpp
from topwork.common.errors import ModelError
from topwork.export.gguf import families
from topwork.export.gguf.hparams import hparams_of
from topwork.export.gguf.llama_cpp import LlamaCpp
from topwork.export.gguf.model import write_gguf_model

CLOSE = 1e-3
"""fp32 sums in another order make 2e-6 of it; an input of GELU's table (gemma) that falls to its other side, a
float16's last place, 5e-5. What is wrong in a record is seen at 2."""
FULL = {"use_sliding_window": False, "layer_types": None}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 512,
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + 0.5 * i for i in range(8)],
}  # fmt: skip
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
BY_KIND = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": None, "head_dim": 24}),
    ("qwen2", FULL),
    ("qwen2", {**FULL, "rope_parameters": YARN}),
    ("qwen3", {**FULL, "head_dim": 32}),
    ("gemma", {}),
    ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32}),
    ("gemma3_text", {}),
    ("gemma3_text", {"layer_types": None, "num_hidden_layers": 7}),
    ("gemma3_text", {"rope_parameters": BY_KIND, "tie_word_embeddings": False}),
    ("gemma3_text", {"layer_types": ["full_attention", "full_attention"]}),
    ("phi3", {"sliding_window": None}),
    ("phi3", {"sliding_window": None, "rope_parameters": HALF}),
    (
        "phi3",
        {"sliding_window": None, "rope_parameters": LONGROPE, "original_max_position_embeddings": 512,
         "max_position_embeddings": 1024},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "values"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_familys_logits_in_llama_cpp_are_transformers_own(tmp_path, family, values):
    model, given = tiny(family, **values), prompts()
    reader = LlamaCpp(written(tmp_path, model).path, 64)
    expected = last_logprobs(as_llama_cpp(model, lambda _: "f32"), given)
    assert max(apart(reader, given, expected)) < CLOSE


@pytest.mark.parametrize(
    ("family", "values", "change"),
    [
        ("llama", {}, {"pairs_rotary": False}),
        ("qwen3", FULL, {"pairs_rotary": True}),
        ("gemma2", {}, {"norm_offset": 0.0}),
        ("gemma3_text", {}, {"norm_offset": 0.0}),
    ],
)
def test_a_record_that_says_otherwise_is_seen_in_the_logits(tmp_path, monkeypatch, family, values, change):
    model, given = tiny(family, **values), prompts((20,))
    monkeypatch.setitem(families.FAMILIES, family, replace(families.FAMILIES[family], **change))
    reader = LlamaCpp(written(tmp_path, model).path, 64)
    assert max(apart(reader, given, last_logprobs(model, given))) > 100 * CLOSE


def _refused(family: str, **values: Any) -> str:
    with pytest.raises(ModelError) as error:
        hparams_of({"model_type": family, **values})
    return str(error.value)


def test_what_llama_cpp_would_compute_otherwise_is_refused_by_name():
    assert "dynamic" in _refused("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert "llama3" in _refused("qwen2", rope_scaling=LLAMA3)
    assert "attention_factor" in _refused("qwen3", rope_scaling={**YARN, "attention_factor": 2.0})
    assert "partial_rotary_factor" in _refused(
        "llama", rope_scaling={"rope_type": "default", "partial_rotary_factor": 0.5}
    )
    assert "'relu'" in _refused("llama", hidden_act="relu")
    assert "query_pre_attn_scalar 100" in _refused("gemma2", query_pre_attn_scalar=100)
    assert "final_logit_softcapping None" in _refused("gemma2", final_logit_softcapping=None)
    assert "final_logit_softcapping 30" in _refused("gemma3_text", final_logit_softcapping=30.0)
    assert "no pattern" in _refused(
        "gemma2", num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "sliding_attention"]
    )
    assert "hidden size ÷ heads" in _refused("qwen2", hidden_size=64, num_attention_heads=3, head_dim=16)
    assert "bidirectional" in _refused("gemma3_text", use_bidirectional_attention=True)


def test_a_family_that_is_not_in_the_table_is_refused_with_the_list():
    message = _refused("mixtral")
    assert "'mixtral'" in message
    assert "qwen3" in message
    assert "did you mean 'mistral'" in message


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3"])
def test_a_window_that_llama_cpp_has_not_bounds_the_context_within_which_it_is_the_model(tmp_path, family):
    model, told = tiny(family), []
    file = tmp_path / "f32.gguf"
    found = write_gguf_model(as_lazy(model), byte_level(), None, file, "f32", told.append)
    assert "context of 5 tokens instead of 64" in told[0]
    assert found.notes == tuple(told)
    given = prompts((1, 3, 4))
    assert max(apart(LlamaCpp(file, 64), given, last_logprobs(model, given))) < CLOSE


def test_a_bias_and_a_weight_without_a_place_are_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj\.bias.*'qwen3' does not read"):
        written(tmp_path, tiny("qwen3", **FULL, attention_bias=True))
    lazy = as_lazy(tiny("llama"))
    lazy.tensors["model.layers.0.mlp.experts.3.weight"] = lazy.tensors["model.norm.weight"]
    with pytest.raises(ModelError, match=r"experts\.3\.weight has no place"):
        write_gguf_model(lazy, byte_level(), None, tmp_path / "x.gguf", "f32", lambda _: None)


def test_a_head_of_its_own_is_written_or_refused_and_a_copy_of_the_embedding_is_left_out(tmp_path):
    model, given = tiny("gemma3_text", tie_word_embeddings=True), prompts((20,))
    lazy = as_lazy(model)
    lazy.tensors["lm_head.weight"] = lazy.tensors["model.embed_tokens.weight"]
    one = write_gguf_model(lazy, byte_level(), None, tmp_path / "one.gguf", "f32", lambda _: None)
    two = written(tmp_path, model)
    assert one.bytes == two.bytes
    trained = lazy.tensors["model.embed_tokens.weight"].fetch() + 0.01
    lazy.tensors["lm_head.weight"] = replace(lazy.tensors["lm_head.weight"], fetch=lambda: trained)
    found = write_gguf_model(lazy, byte_level(), None, tmp_path / "own.gguf", "f32", lambda _: None)
    model.lm_head.weight = torch.nn.Parameter(trained)
    expected = last_logprobs(as_llama_cpp(model, lambda _: "f32"), given)
    assert max(apart(LlamaCpp(found.path, 64), given, expected)) < CLOSE
    with pytest.raises(ModelError, match="a head of its own"):
        write_gguf_model(
            replace(lazy, config={**tiny("gemma2").config.to_dict()}), byte_level(), None, tmp_path / "no.gguf", "f32",
            lambda _: None,
        )  # fmt: skip
