"""The formulas of planning memory against what is really allocated and kept, of tiny models."""

from typing import Any

import pytest
import torch

from reference.compiler import NATIVE
from reference.families import learning_batch, sequences, tiny_base
from reference.kept import kept_bytes_per_token as measured_per_token
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.sizes import tensor_sizes
from topwork.models.checkpointing import checkpoint_layers
from topwork.models.recognise import is_fast
from topwork.models.structure_of import structure_of
from topwork.quantization.config import QuantizationConfig
from topwork.training.memory import PassShape, Setup
from topwork.training.memory_layers import layers_of
from topwork.training.memory_pass import layer_need
from topwork.training.memory_setup import Member

WIDE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "n_embd": 128, "n_inner": 256, "ffn_dim": 256,
    "word_embed_proj_dim": 128,
}  # fmt: skip
LORA: dict[str, Any] = {"r": 2}


def kept(family: str, dtype: torch.dtype, count: int = 0, **options: Any) -> tuple[float, float]:
    """Bytes a token between a short and a long batch: (by autograd's hooks, by the formulas)."""
    base = tiny_base(family, **WIDE, dtype=dtype)
    structure, adapter = structure_of(base.module, is_fast(base.module)), AdapterConfig(**options)
    adapters = Adapters(base.module)
    adapters.add("a", adapter)
    adapters.train("a")
    checkpoint_layers(base, count)
    short, long = (learning_batch(sequences([length] * 2), "a") for length in (8, 24))
    told = str(dtype).removeprefix("torch.")
    setup = Setup(structure, told, QuantizationConfig(), (Member(adapter, "adamw", tensor_sizes(structure, adapter)),))
    formulas = [planned_kept(setup, len(batch), count) for batch in (short, long)]
    last_norm = 4 * structure.hidden + 4 if structure.family not in ("gpt2", "opt", "phi") else 0
    last_norm = last_norm or dtype.itemsize * (structure.hidden + 2)
    per_token = (formulas[1] - formulas[0]) / (len(long) - len(short))
    return measured_per_token(base, short, long), per_token + last_norm


def planned_kept(setup: Setup, tokens: int, count: int) -> int:
    """All rows go through all layers, as where hidden states are asked for."""
    shape, layers = PassShape(tokens, tokens, tokens), layers_of(setup)
    whole = [need.saved + need.heap for need in (layer_need(layer, shape) for layer in layers[count:])]
    return sum(whole)


@pytest.mark.skipif(not NATIVE, reason="plain torch keeps no logarithms of the softmax")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "olmo2", "phi3", "granite", "smollm3"])
def test_what_fast_layers_keep_is_what_the_formula_says(family: str, dtype: torch.dtype) -> None:
    found, expected = kept(family, dtype, **LORA)
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi", "starcoder2", "mixtral", "qwen3_moe", "gpt_oss"])
def test_what_plain_layers_keep_is_near(family: str) -> None:
    found, expected = kept(family, torch.bfloat16, **LORA)
    assert found == pytest.approx(expected, rel=0.05)
