"""Families of which a test has proven that a flat batch is what transformers computes. Free of torch."""

PROVEN = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "smollm3", "gpt2",
    "mixtral", "qwen3_moe", "gpt_oss", "opt", "starcoder2", "phi",
})  # fmt: skip
"""model_type of each family that tests/models/test_families.py compares with transformers' own forward."""
