"""Families of which a test has proven that a flat batch is what transformers computes. Free of torch."""

PROVEN = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "smollm3", "gpt2",
    "mixtral", "qwen3_moe", "gpt_oss", "opt", "starcoder2", "phi",
})  # fmt: skip
"""model_type of each family that tests/models/test_families.py compares with transformers' own forward."""

TEXT_PARTS = frozenset({"qwen2_vl_text", "qwen2_5_vl_text"})
"""The same of those that are but the text part of models that read pictures too."""
