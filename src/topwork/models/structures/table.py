"""The families whose structure a config alone tells: how each is laid out, and what its class says of what a config
leaves out. A size that a config has to state (`hidden_size`, `vocab_size` …) has no default here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from topwork.models.structures import llama, multimodal, others
from topwork.models.structures.parts import Node
from topwork.models.structures.values import Values


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    layout     the tree of its modules
    fast       whether all its layers run through `models/fast.py`, with an activation that this knows
    defaults   what its config class gives where a config.json is silent
    embedding  the path of its input embedding; `head` that of its output head
    only       values with which alone it is laid out so; any other needs a skeleton
    """

    layout: Callable[[Values], Node]
    fast: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    only: Mapping[str, Any] = field(default_factory=dict)


SILU = {"hidden_act": "silu"}
GELU_TANH = {"hidden_act": "gelu_pytorch_tanh"}
GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh"}

FAMILIES: dict[str, Family] = {
    "llama": Family(llama.llama, True, {**SILU, "max_position_embeddings": 2048}),
    "mistral": Family(llama.llama, True, {**SILU, "num_key_value_heads": 8, "max_position_embeddings": 131072}),
    "granite": Family(llama.llama, True, {**SILU, "max_position_embeddings": 2048}),
    "smollm3": Family(
        llama.llama, True,
        {**SILU, "num_key_value_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": 32768},
    ),
    "qwen2": Family(llama.qwen2, True, {**SILU, "num_key_value_heads": 32, "max_position_embeddings": 32768}),
    "qwen3": Family(
        llama.qwen3, True, {**SILU, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768}
    ),
    "gemma": Family(
        llama.llama, True,
        {**GELU_TANH, "tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 16,
         "max_position_embeddings": 8192},
    ),
    "gemma2": Family(llama.gemma2, True, {**GEMMA, "num_key_value_heads": 4, "max_position_embeddings": 8192}),
    "gemma3_text": Family(
        llama.gemma3, True, {**GEMMA, "num_key_value_heads": 4, "max_position_embeddings": 131072}
    ),
    "phi3": Family(llama.phi3, True, {**SILU, "max_position_embeddings": 4096}),
    "olmo": Family(llama.olmo, False, {**SILU, "max_position_embeddings": 2048}),
    "olmo2": Family(llama.olmo2, True, {**SILU, "max_position_embeddings": 2048}),
    "olmo3": Family(llama.olmo2, True, {**SILU, "max_position_embeddings": 2048}),
    "exaone4": Family(llama.exaone4, True, {**SILU, "num_key_value_heads": 32, "max_position_embeddings": 2048}),
    "glm": Family(
        llama.glm, False,
        {**SILU, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True, "max_position_embeddings": 131072},
    ),
    "glm4": Family(
        llama.glm4, False,
        {**SILU, "num_key_value_heads": 2, "head_dim": 128, "attention_bias": True, "max_position_embeddings": 131072},
    ),
    "cohere": Family(llama.cohere, False, {**SILU, "tie_word_embeddings": True, "max_position_embeddings": 8192}),
    "cohere2": Family(llama.cohere, False, {**SILU, "tie_word_embeddings": True, "max_position_embeddings": 8192}),
    "stablelm": Family(
        llama.stablelm, False, {**SILU, "num_key_value_heads": 32, "max_position_embeddings": 4096},
        only={"qk_layernorm": False},
    ),
    "starcoder2": Family(
        llama.starcoder2, False,
        {**GELU_TANH, "num_key_value_heads": 2, "use_bias": True, "tie_word_embeddings": True,
         "max_position_embeddings": 4096},
    ),
    "mixtral": Family(
        llama.mixtral, False,
        {**SILU, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
         "max_position_embeddings": 131072},
    ),
    "olmoe": Family(
        llama.olmoe, False,
        {**SILU, "num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 2048,
         "max_position_embeddings": 4096},
    ),
    "qwen2_moe": Family(
        llama.qwen2_moe, False,
        {**SILU, "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
         "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1, "qkv_bias": True,
         "max_position_embeddings": 32768},
    ),
    "qwen3_moe": Family(
        llama.qwen3_moe, False,
        {**SILU, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
         "decoder_sparse_step": 1, "max_position_embeddings": 32768},
    ),
    "gpt_oss": Family(
        llama.gpt_oss, False,
        {**SILU, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4,
         "attention_bias": True, "max_position_embeddings": 131072},
    ),
    "deepseek_v3": Family(
        llama.deepseek_v3, False,
        {**SILU, "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
         "moe_intermediate_size": 2048, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
         "qk_nope_head_dim": 128, "v_head_dim": 128, "first_k_dense_replace": 3, "max_position_embeddings": 4096},
    ),
    "gpt2": Family(
        others.gpt2, False, {"tie_word_embeddings": True, "n_positions": 1024}, "transformer.wte",
        only={"add_cross_attention": False},
    ),
    "gpt_neox": Family(
        others.gpt_neox, False, {"attention_bias": True, "max_position_embeddings": 2048}, "gpt_neox.embed_in"
    ),
    "opt": Family(
        others.opt, False,
        {"enable_bias": True, "layer_norm_elementwise_affine": True, "do_layer_norm_before": True,
         "tie_word_embeddings": True, "max_position_embeddings": 2048},
        "model.decoder.embed_tokens",
    ),
    "phi": Family(others.phi, False, {"max_position_embeddings": 2048}),
    "bloom": Family(others.bloom, False, {"tie_word_embeddings": True}, "transformer.word_embeddings"),
    "falcon": Family(
        others.falcon, False,
        {"multi_query": True, "parallel_attn": True, "tie_word_embeddings": True, "max_position_embeddings": 2048},
        "transformer.word_embeddings",
    ),
}  # fmt: skip
"""model_type -> how it is laid out."""

TEXT_PARTS: dict[str, Family] = {
    name: Family(llama.qwen2, True, {**SILU, "num_key_value_heads": 8, "max_position_embeddings": 32768})
    for name in ("qwen2_vl_text", "qwen2_5_vl_text")
}
"""Those that are text parts alone, and no models of their own."""


@dataclass(frozen=True)
class Wrapper:
    """One `model_type` of models that read pictures too.

    beside    the modules before its text part; None where its vision part is of another kind
    text      the `model_type` of its text part; with `any_text` where the config names no other
    defaults  what that one's class gives beside FAMILIES' defaults: sizes that configs leave out
    ties      whether the head is tied where the config is silent; None where it is tied as its text part says
    flat      whether older configs hold the text part's values beside its own
    """

    beside: Callable[[Mapping[str, Any], Values], dict[str, Node] | None]
    text: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ties: bool | None = None
    any_text: bool = False
    flat: bool = False


QWEN_VL = {
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64,
}  # fmt: skip

WRAPPERS: dict[str, Wrapper] = {
    "gemma3": Wrapper(
        multimodal.gemma3, "gemma3_text",
        {"num_attention_heads": 8, "vocab_size": 262208, "intermediate_size": 9216}, ties=True,
    ),
    "llava": Wrapper(
        multimodal.llava, "llama",
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32},
        any_text=True,
    ),
    "mistral3": Wrapper(
        multimodal.mistral3, "mistral",
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32},
        ties=True, any_text=True,
    ),
    "qwen2_vl": Wrapper(multimodal.qwen2_vl, "qwen2_vl_text", QWEN_VL, flat=True),
    "qwen2_5_vl": Wrapper(multimodal.qwen2_5_vl, "qwen2_5_vl_text", QWEN_VL, flat=True),
}  # fmt: skip
"""model_type -> what stands around its text part. These are the ones whose text part can be trained
(`models/auto.py`)."""
