"""A family's flat batch is each sequence alone through transformers' own forward: logits and gradients, fp32."""

import re
from pathlib import Path

import pytest

from reference.families import LENGTHS, PICTURES, WINDOW, batch_differences, tiny_model
from topwork.models.proven import PROVEN

TABLE = Path(__file__).parents[2] / "docs" / "families.md"
REQUIRED = {
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "smollm3", "gpt2",
    "mixtral", "qwen3_moe", "gpt_oss", "opt", "starcoder2", "phi",
}  # fmt: skip
WINDOWED = {
    "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "mixtral", "qwen3_moe", "gpt_oss",
    "starcoder2",
}  # fmt: skip


@pytest.mark.parametrize("family", [*sorted(PROVEN), *PICTURES])
def test_flat_stream_is_each_sequence_alone(family: str) -> None:
    for measure, difference in batch_differences(family).items():
        assert difference <= 1e-5, (family, measure)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("phi", {"qk_layernorm": True}),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ],
    ids=str,
)
def test_variants_of_a_family(family: str, values: dict[str, object]) -> None:
    for measure, difference in batch_differences(family, **values).items():
        assert difference <= 1e-5, (family, measure)


def test_the_tiny_models_have_what_is_to_be_proven() -> None:
    """A window shorter than a sequence, soft-capping, sinks and a scaled head are really there."""
    assert max(LENGTHS) > WINDOW
    assert min(LENGTHS) == 1
    for family in WINDOWED:
        config = tiny_model(family).config
        assert config.sliding_window == WINDOW, family
        layers = getattr(config, "layer_types", None)
        assert layers is None or "sliding_attention" in layers, family
    assert tiny_model("gemma2").config.attn_logit_softcapping
    assert tiny_model("gemma2").config.final_logit_softcapping
    assert tiny_model("granite").config.logits_scaling != 1
    assert any("sinks" in name for name, _ in tiny_model("gpt_oss").named_parameters())


def test_every_required_family_is_proven() -> None:
    assert REQUIRED <= PROVEN


def test_the_table_in_the_docs_lists_exactly_these() -> None:
    """`python tools/family_table.py` writes it."""
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TABLE.read_text(encoding="utf-8"), re.S | re.M))
    proven = re.findall(r"^\| (\w+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", sections["Proven"], re.M)
    rows = {row[0]: [float(value) for value in row[1:4]] for row in proven if row[0] != "family"}
    whole = {row[0] for row in proven if row[4] == "attention and MLP"}
    assert whole >= {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "phi3",
        "granite",
        "olmo2",
        "smollm3",
    }
    assert rows.keys() == PROVEN
    assert (
        set(re.findall(r"^\| (\w+) \| \d", sections["Text parts of models that read pictures"], re.M))
        == PICTURES.keys()
    )
    assert max(value for values in rows.values() for value in values) <= 1e-5
    assert not {name for name in PROVEN if f"**{name}**" in sections["Refused"]}
