"""The runs whose memory and time are predicted and measured (`planned.py`), and the bases that they train on.

A case is a base, options of a recipe, and rows of one length that fill its passes. Bases are real where they are at
hand (SmolLM2, stories260K) and else random ones of a family's shape, written once into a folder.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common import BENCHMARKS

STORIES = BENCHMARKS.parents[1] / "shared" / "models" / "stories260k"
TOKENIZER = "smollm2-135m"
SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "qwen3-0.6b": {"shape": "qwen3-0.6b"},
    "llama-3.2-1b": {"shape": "llama-3.2-1b"},
    "gemma3-270m": {"shape": "gemma3-270m"},
    "gemma2-4layers": {"shape": "gemma-2-2b", "num_hidden_layers": 4, "vocab_size": 49152},
    "phi3-4layers": {"shape": "phi-3-mini", "num_hidden_layers": 4, "vocab_size": 49152},
    "gpt2": {"shape": "gpt2"},
    "opt-125m": {
        "model_type": "opt", "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "word_embed_proj_dim": 768, "vocab_size": 50272, "max_position_embeddings": 2048,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe", "hidden_size": 512, "intermediate_size": 1536, "moe_intermediate_size": 384,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 16,
        "num_experts_per_tok": 2, "vocab_size": 49152, "max_position_embeddings": 8192,
    },
})  # fmt: skip
"""The random bases: a shipped shape or a model type, and what of its config is set."""


@dataclass(frozen=True)
class Case:
    """A run.

    options   what the recipe sets, as `section.key: value`
    length    tokens of each row; half of them are learned
    tokens    of a pass, which rows of a step fill: with several members, a share of it each
    members   how many adapters train together
    steps     optimizer steps
    passes    of each step
    """

    name: str
    base: str
    tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)
    length: int = 256
    members: int = 1
    steps: int = 8
    learned: float = 0.5
    passes: int = 1

    @property
    def batch_size(self) -> int:
        """Rows of a step, of each member."""
        return self.passes * max(1, self.tokens // self.length // self.members)


OFF = {"training.activation_checkpointing": "off"}
FULL = {"training.activation_checkpointing": "full"}
NF4 = {"quantization.load_in_4bit": True}
INT8 = {"quantization.load_in_8bit": True}
BF16, FP32 = {"model.dtype": "bfloat16"}, {"model.dtype": "float32"}


def _smollm2() -> list[Case]:
    base = "smollm2-135m"
    return [
        Case("smollm2 lora 256", base, 256, BF16 | OFF),
        Case("smollm2 lora 1024", base, 1024, BF16 | OFF),
        Case("smollm2 lora 2048", base, 2048, BF16 | OFF),
        Case("smollm2 lora 4096, rows of 1024", base, 4096, BF16 | OFF, length=1024, steps=3),
        Case("smollm2 lora 8192, rows of 2048", base, 8192, BF16 | OFF, length=2048, steps=3),
        Case("smollm2 lora r4", base, 1024, BF16 | OFF | {"adapter.r": 4}),
        Case("smollm2 lora r256", base, 1024, BF16 | OFF | {"adapter.r": 256}),
        Case("smollm2 lora q,v", base, 1024, BF16 | OFF | {"adapter.target_modules": ["q_proj", "v_proj"]}),
        Case("smollm2 lora fp32", base, 512, FP32 | OFF),
        Case("smollm2 lora checkpointed 15", base, 2048, BF16 | {"training.activation_checkpointing": 15}),
        Case("smollm2 lora checkpointed full", base, 2048, BF16 | FULL),
        Case("smollm2 lora checkpointed full 8192", base, 8192, BF16 | FULL, length=1024, steps=3),
        Case("smollm2 dropout", base, 1024, BF16 | OFF | {"adapter.lora_dropout": 0.1}),
        Case("smollm2 adamw_8bit r64", base, 512, BF16 | OFF | {"adapter.r": 64, "training.optim": "adamw_8bit"}),
        Case("smollm2 paged r64", base, 512, BF16 | OFF | {"adapter.r": 64, "training.optim": "paged_adamw_8bit"}),
        Case("smollm2 dora", base, 1024, BF16 | OFF | {"adapter.use_dora": True}),
        Case("smollm2 dora dropout", base, 512, BF16 | OFF | {"adapter.use_dora": True, "adapter.lora_dropout": 0.1}),
        Case("smollm2 pissa", base, 512, BF16 | OFF | {"adapter.init_lora_weights": "pissa"}),
        Case("smollm2 ia3", base, 1024, BF16 | OFF | {"adapter.method": "ia3"}),
        Case("smollm2 prefix", base, 1024, BF16 | OFF | {"adapter.method": "prefix"}),
        Case("smollm2 prompt", base, 1024, BF16 | OFF | {"adapter.method": "prompt"}),
        Case("smollm2 embedding saved", base, 512, BF16 | OFF | {"adapter.modules_to_save": ["embed_tokens"]}),
        Case("smollm2 full", base, 512, BF16 | OFF | {"adapter.method": "full"}),
        Case("smollm2 full 8bit", base, 512, BF16 | OFF | {"adapter.method": "full", "training.optim": "adamw_8bit"}),
        Case("smollm2 full checkpointed", base, 1024, BF16 | FULL | {"adapter.method": "full"}),
        Case("smollm2 full two passes", base, 512, BF16 | OFF | {"adapter.method": "full"}, passes=2),
        Case("smollm2 nf4", base, 1024, BF16 | OFF | NF4),
        Case("smollm2 nf4 without DQ", base, 512, BF16 | OFF | NF4 | {"quantization.bnb_4bit_use_double_quant": False}),
        Case("smollm2 nf4 head int8", base, 1024, BF16 | OFF | NF4 | {"quantization.head": "int8"}),
        Case("smollm2 nf4 head nf4", base, 512, BF16 | OFF | NF4 | {"quantization.head": "nf4"}),
        Case("smollm2 nf4 dora", base, 512, BF16 | OFF | NF4 | {"adapter.use_dora": True}),
        Case("smollm2 int8", base, 1024, BF16 | OFF | INT8),
        Case("smollm2 six members", base, 1536, BF16 | OFF, members=6),
        Case("smollm2 six members nf4", base, 1536, BF16 | OFF | NF4, members=6),
        Case("smollm2 learned 0.1", base, 2048, BF16 | OFF, learned=0.1),
    ]


def _small() -> list[Case]:
    base = "stories260k"
    return [
        Case("stories lora", base, 1024, FP32 | OFF, steps=12),
        Case("stories lora 8192", base, 8192, FP32 | OFF, steps=12),
        Case("stories bf16", base, 2048, BF16 | OFF, steps=12),
        Case("stories full", base, 1024, FP32 | OFF | {"adapter.method": "full"}, steps=12),
        Case("stories checkpointed", base, 8192, FP32 | FULL, steps=12),
    ]


def _families() -> list[Case]:
    return [
        Case("qwen3-0.6b lora 512", "qwen3-0.6b", 512, BF16 | OFF, steps=5),
        Case("qwen3-0.6b lora checkpointed", "qwen3-0.6b", 1024, BF16 | FULL, steps=5),
        Case("qwen3-0.6b nf4", "qwen3-0.6b", 512, BF16 | OFF | NF4, steps=5),
        Case("qwen3-0.6b nf4 head nf4", "qwen3-0.6b", 512, BF16 | OFF | NF4 | {"quantization.head": "nf4"}, steps=5),
        Case("qwen3-0.6b dora", "qwen3-0.6b", 256, BF16 | OFF | {"adapter.use_dora": True}, steps=5),
        Case("llama-3.2-1b lora 256", "llama-3.2-1b", 256, BF16 | OFF, steps=5),
        Case("llama-3.2-1b lora 1024", "llama-3.2-1b", 1024, BF16 | OFF, steps=5),
        Case("llama-3.2-1b nf4", "llama-3.2-1b", 512, BF16 | OFF | NF4, steps=5),
        Case("llama-3.2-1b int8 checkpointed", "llama-3.2-1b", 512, BF16 | FULL | INT8, steps=5),
        Case("gemma3-270m lora", "gemma3-270m", 1024, BF16 | OFF, steps=5),
        Case("gemma3-270m nf4", "gemma3-270m", 512, BF16 | OFF | NF4, steps=5),
        Case("gemma3-270m ia3", "gemma3-270m", 512, BF16 | OFF | {"adapter.method": "ia3"}, steps=5),
        Case("gemma2 lora", "gemma2-4layers", 512, BF16 | OFF, steps=5),
        Case("phi3 lora", "phi3-4layers", 1024, BF16 | OFF, steps=5),
        Case("phi3 dora", "phi3-4layers", 512, BF16 | OFF | {"adapter.use_dora": True}, steps=5),
        Case("gpt2 lora", "gpt2", 1024, BF16 | OFF),
        Case("gpt2 lora fp32", "gpt2", 512, FP32 | OFF),
        Case("gpt2 lora checkpointed", "gpt2", 2048, BF16 | FULL),
        Case("gpt2 dropout", "gpt2", 512, BF16 | OFF | {"adapter.lora_dropout": 0.1}),
        Case("gpt2 full", "gpt2", 512, BF16 | OFF | {"adapter.method": "full"}),
        Case("gpt2 nf4", "gpt2", 512, BF16 | OFF | NF4),
        Case("gpt2 bitfit", "gpt2", 512, BF16 | OFF | {"adapter.method": "bitfit"}),
        Case("opt lora", "opt-125m", 1024, BF16 | OFF),
        Case("qwen3-moe lora", "qwen3-moe", 1024, BF16 | OFF),
    ]


CASES = {case.name: case for case in (*_smollm2(), *_small(), *_families())}


def words_of(tokenizer: Path) -> list[str]:
    """Words that a byte-level BPE (a tokenizer.json) has as one token each, mixed: rows of these look at an embedding
    all over, as rows of texts do, and what of a mapped file nobody looks at takes no memory. Two words where there is
    none."""
    if not tokenizer.is_file():
        return [" the", " and"]
    pieces = json.loads(tokenizer.read_text("utf-8"))["model"]["vocab"]
    whole = [piece[1:] for piece in pieces if re.fullmatch("Ġ[a-z]+", piece)]
    random.Random(0).shuffle(whole)
    return [f" {word}" for word in whole]


def write_rows(path: Path, case: Case, count: int, words: Sequence[str]) -> Path:
    """Rows of `case.length` tokens each: every word is one, and a sequence's end is one more."""
    answer = max(1, round(case.learned * case.length))
    endless = cycle(words)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt, completion = ("".join(islice(endless, size)) for size in (case.length - answer, answer - 1))
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    return path


SET_ON = frozenset({
    "smollm2 lora 256", "smollm2 lora 1024", "smollm2 lora 2048", "smollm2 lora r256", "smollm2 lora q,v",
    "smollm2 dropout", "smollm2 prefix", "smollm2 nf4 head int8", "smollm2 nf4 head nf4", "stories lora",
    "stories lora 8192", "stories bf16", "stories checkpointed", "gpt2 lora", "gpt2 lora fp32",
    "gpt2 lora checkpointed", "qwen3-moe lora", "smollm2 pissa",
    "gpt2 dropout", "gpt2 full", "smollm2 full", "smollm2 full 8bit",
    "smollm2 full checkpointed", "smollm2 full two passes", "smollm2 embedding saved", "smollm2 ia3",
    "smollm2 lora 8192, rows of 2048", "gemma2 lora", "phi3 lora", "phi3 dora", "llama-3.2-1b int8 checkpointed",
    "gemma3-270m lora", "gemma3-270m nf4", "gemma3-270m ia3",
})  # fmt: skip
"""The runs that were looked at while constants of `training/memory_process.py` and `memory_plain.py` were set: that the
prediction is near in these says less than in the others."""
