"""The rows of the adapters' property sheet: a method with options, and on which base and how strictly it is tried.

Every property in `test_properties.py` is asked of every row. A new method is a row here.
"""

from dataclasses import dataclass, field
from typing import Any

from adapters.toy import ToyConfig
from reference.measure import LOGITS_APART
from topwork.adapters.config import AdapterConfig


@dataclass(frozen=True)
class Row:
    """One method with options.

    family, values  the base it is tried on, and its config's values
    fresh           how far a fresh adapter may be from the base in fp32, relative; 0.0 is bit for bit, and None says
                    that a fresh one is not the base (prefix and prompt tuning)
    fresh_bf16      the same in bf16. Trained head norms take attention to plain modules, which round in other places
    merges          whether it can be folded into the weights; where not, merging is to be refused
    quantized       whether it can stand on an NF4 base; `dense`, whether on a dense one
    """

    config: AdapterConfig
    family: str = "llama"
    values: dict[str, Any] = field(default_factory=dict)
    fresh: float | None = 0.0
    fresh_bf16: float = 0.0
    merges: bool = True
    quantized: bool = True
    dense: bool = True


def lora(**values: Any) -> AdapterConfig:
    """LoRA of rank 4 on all linear layers."""
    return AdapterConfig(**{"r": 4, "lora_alpha": 8, **values})


ROWS: dict[str, Row] = {
    "lora": Row(lora()),
    "lora with dropout": Row(lora(lora_dropout=0.3)),
    "lora, head and norms saved": Row(lora(modules_to_save=["lm_head", "norm"]), fresh=LOGITS_APART),
    "rslora with patterns": Row(lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})),
    "dora": Row(lora(use_dora=True)),
    "dora with dropout": Row(lora(use_dora=True, lora_dropout=0.3)),
    "dora, rslora, patterns, head norms": Row(
        lora(use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}), "qwen3"
    ),
    "dora on gpt2": Row(lora(use_dora=True), "gpt2"),
    "all biases beside lora": Row(lora(bias="all"), "gpt2"),
    "biases of targets and of b": Row(lora(bias="lora_only", lora_bias=True, lora_dropout=0.2), "gpt2"),
    "biases beside dora": Row(lora(use_dora=True, bias="all"), "qwen2"),
    "b's bias where none can hold it": Row(
        lora(target_modules=["q_proj", "o_proj"], lora_bias=True), "qwen2", merges=False
    ),
    "pissa": Row(lora(init_lora_weights="pissa")),
    "olora": Row(lora(init_lora_weights="olora", use_rslora=True), "gpt2"),
    "loftq": Row(lora(init_lora_weights="loftq"), fresh=None, dense=False),
    "ia3": Row(AdapterConfig(method="ia3")),
    "ia3 on gpt2": Row(AdapterConfig(method="ia3"), "gpt2"),
    "ia3 on inputs alone": Row(
        AdapterConfig(method="ia3", target_modules=["q_proj", "up_proj"], feedforward_modules=["q_proj", "up_proj"])
    ),
    "vera": Row(AdapterConfig(method="vera", r=12)),
    "vera with dropout, drawn again": Row(
        AdapterConfig(method="vera", r=12, vera_dropout=0.3, save_projection=False, modules_to_save=["norm"]),
        fresh=LOGITS_APART,
    ),
    "loha": Row(AdapterConfig(method="loha", r=3, alpha=6)),
    "lokr": Row(AdapterConfig(method="lokr", r=2, alpha=4)),
    "lokr of whole matrices": Row(AdapterConfig(method="lokr", r=8, decompose_factor=4)),
    "lokr of two products on gpt2": Row(AdapterConfig(method="lokr", r=1, alpha=3, decompose_both=True), "gpt2"),
    "oft": Row(AdapterConfig(method="oft", oft_block_size=16), fresh=LOGITS_APART, fresh_bf16=2e-2),
    "oft, near and shared": Row(
        AdapterConfig(method="oft", r=4, block_share=True, coft=True, eps=0.3, use_cayley_neumann=False),
        "qwen2",
        fresh=LOGITS_APART,
        fresh_bf16=2e-2,
    ),
    "bitfit": Row(AdapterConfig(method="bitfit"), "gpt2"),
    "bitfit on qwen2": Row(AdapterConfig(method="bitfit"), "qwen2"),
    "full": Row(AdapterConfig(method="full"), fresh=LOGITS_APART),
    "full, tied": Row(AdapterConfig(method="full"), "qwen2", {"tie_word_embeddings": True}, fresh=LOGITS_APART),
    "full with head norms": Row(AdapterConfig(method="full"), "qwen3", fresh=LOGITS_APART, fresh_bf16=2e-2),
    "full with turned head norms": Row(
        AdapterConfig(method="full"), "gemma3_text", fresh=LOGITS_APART, fresh_bf16=2e-2
    ),
    "head norms saved": Row(lora(modules_to_save=["k_norm"]), "qwen3", fresh=LOGITS_APART, fresh_bf16=2e-2),
    "prefix": Row(AdapterConfig(method="prefix", num_virtual_tokens=3), fresh=None, merges=False),
    "prefix on qwen3": Row(AdapterConfig(method="prefix", num_virtual_tokens=2), "qwen3", fresh=None, merges=False),
    "prompt": Row(AdapterConfig(method="prompt", num_virtual_tokens=3), fresh=None, merges=False),
    "prompt of the vocabulary on gemma3": Row(
        AdapterConfig(method="prompt", num_virtual_tokens=2, prompt_tuning_init="vocabulary"),
        "gemma3_text",
        fresh=None,
        merges=False,
    ),
    "a method of one's own": Row(ToyConfig()),
    "embedding lora": Row(lora(target_modules=["embed_tokens", "v_proj"])),
    "embedding lora, tied": Row(lora(target_modules=["embed_tokens"]), "gemma3_text", {"tie_word_embeddings": True}),
    "head lora": Row(lora(target_modules=["lm_head"], lora_dropout=0.2)),
    "head lora, tied": Row(lora(target_modules=["lm_head", "q_proj"]), values={"tie_word_embeddings": True}),
    "experts of mixtral and their router": Row(lora(), "mixtral"),
    "experts of gpt_oss": Row(
        lora(
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            rank_pattern={"experts.down_proj": 3},
        ),
        "gpt_oss",
    ),
    "trained tokens": Row(lora(trainable_token_indices=[7, 5, 98])),
    "trained tokens of both ends": Row(lora(trainable_token_indices={"embed_tokens": [7, 5], "lm_head": [98, 7, 40]})),
    "trained tokens, tied": Row(
        lora(target_modules=["q_proj"], trainable_token_indices=[3, 50]), "gemma3_text", {"tie_word_embeddings": True}
    ),
}
"""Name -> row."""
