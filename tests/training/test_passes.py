"""Pass sizes and checkpointed layers follow from free memory; training depends on neither."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from reference.compiler import NATIVE
from reference.families import learning_batch, randomise, sequences, tiny_base
from reference.kept import kept_bytes_per_token as measured_bytes
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.common.errors import RecipeError
from topwork.data.batches import AdapterRows
from topwork.data.examples import Example
from topwork.models.checkpointing import checkpoint_layers
from topwork.objectives.sft import Sft
from topwork.training.config import Checkpointing, TrainingConfig
from topwork.training.passes import (
    Memory,
    PassPlan,
    activation_bytes_per_token,
    kept_bytes_per_token,
    layer_bytes_per_token,
    plan_passes,
    step_passes,
)
from topwork.training.step import Learner, StepResult, train_step

SMOLLM2 = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
)
LAYERS = 30


def plan(
    needed: tuple[int, int],
    tokens: int | None = None,
    layers: Checkpointing = "auto",
    longest: int = 300,
    there: int = LAYERS,
    spare: int = 1,
    device: str = "cpu",
) -> PassPlan:
    """With just the memory (twice, since half is planned with) that so many tokens with so many layers need."""
    budget, checkpointed = needed
    free = 2 * budget * activation_bytes_per_token(SMOLLM2, checkpointed) + spare
    return plan_passes(tokens, layers, longest, Memory(SMOLLM2, torch.device(device), free, there))


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        ((10**6, 0), (2048, 0)),
        ((2048, 0), (2048, 0)),
        ((1024, 0), (1024, 0)),
        ((512, 0), (512, 0)),
        ((512, 7), (512, 7)),  # smaller passes would be slower: checkpointing takes over
        ((512, 8), (512, 8)),
        ((512, 29), (512, 29)),
        ((256, 29), (256, 29)),  # never all: the last layer's memory is taken again at once
        ((1, 29), (300, 29)),  # the longest sequence is not cut, whatever memory says
    ],
    ids=str,
)
def test_smaller_passes_first_then_as_few_layers_as_fit(needed: tuple[int, int], expected: tuple[int, int]) -> None:
    longest = 300 if needed[0] == 1 else 200
    assert plan(needed, longest=longest) == PassPlan(*expected)


def test_a_pass_that_cannot_be_smaller_is_checkpointed() -> None:
    assert plan((2048, 12), tokens=2048) == PassPlan(2048, 12)
    assert plan((2048, 12), longest=2048) == PassPlan(2048, 12)
    assert plan((2048, 12), tokens=2048, spare=-1) == PassPlan(2048, 13)
    assert plan((1, 30), tokens=2048) == PassPlan(2048, 29)


def test_what_was_asked_for_is_done() -> None:
    assert plan((1, 30), tokens=2048, layers="off") == PassPlan(2048, 0)
    assert plan((10**6, 0), tokens=700, layers="full") == PassPlan(700, 30)
    assert plan((10**6, 0), tokens=700, layers=5) == PassPlan(700, 5)
    assert plan((2048, 0), layers=31) == PassPlan(2048, 31)  # refused by name where it is switched on
    assert plan((1024, 20), layers=20) == PassPlan(1024, 20)
    assert plan((512, 0), layers="full") == PassPlan(2048, 30)
    assert plan((256, 0), layers="off", longest=100) == PassPlan(256, 0)
    with pytest.raises(RecipeError, match="Give at least 300"):
        plan((10**6, 0), tokens=299)


def row(length: int, token: int = 1, group: int | None = None) -> Example:
    """All of it learned but the first token."""
    weights = np.ones(length, np.float32)
    weights[0] = 0
    return Example(np.full(length, token, np.int32), weights, "row", group=group)


def test_virtual_tokens_take_room_in_a_pass() -> None:
    groups: list[AdapterRows] = [("lora", [row(40), row(40)]), ("prompt", [row(40), row(40)])]

    def lengths(virtual: dict[str, int]) -> list[list[tuple[str | None, int]]]:
        passes = step_passes(groups, 160, torch.device("cpu"), virtual)
        return [[(part.adapter, part.stop - part.start) for part in batch.segments] for batch in passes]

    assert lengths({}) == [[("lora", 80), ("prompt", 80)]]
    assert lengths({"prompt": 1}) == [[("lora", 80), ("prompt", 40)], [("prompt", 40)]]
    assert lengths({"lora": 40, "prompt": 41}) == [[("lora", 80)], [("prompt", 40)], [("prompt", 40)]]


def test_what_a_row_draws_from_is_its_own() -> None:
    """Its adapter's seed and its number: another packing, order of adapters or company changes nothing."""

    def rows(*lengths: int) -> list[Example]:
        return [row(length, token=length) for length in lengths]

    groups: list[AdapterRows] = [("a", rows(20, 30, 40)), ("b", rows(21, 20))]

    def drawn(groups: Sequence[AdapterRows], budget: int, **seeds: int) -> dict[tuple[str | None, int], list[int]]:
        found = {}
        for batch in step_passes(groups, budget, torch.device("cpu"), seeds=seeds):
            for start, stop in pairwise(batch.cu_seqlens):
                owner = next(part.adapter for part in batch.segments if part.start <= start < part.stop)
                assert batch.dropout_seeds is not None
                found[owner, stop - start] = batch.dropout_seeds[start:stop].tolist()
        return found

    expected = drawn(groups, 1000, a=5, b=6)
    assert len(expected) == 5
    assert len({draw for draws in expected.values() for draw in draws}) == 131  # no token as another
    assert drawn(groups, 41, a=5, b=6) == drawn(groups[::-1], 75, a=5, b=6) == expected
    alone = drawn(groups[1:], 1000, b=6)
    assert alone == {key: draws for key, draws in expected.items() if key[0] == "b"}
    pairs = [row(length, length, group=number % 3) for number, length in enumerate((20, 30, 40, 22, 31, 41))]
    packed = drawn([("a", pairs)], 90, a=5)  # packing puts every pair together
    assert packed == drawn([("a", [replace(row, group=None) for row in pairs])], 1000, a=5)
    other = drawn(groups, 1000, a=5, b=7)
    assert [key for key in expected if other[key] == expected[key]] == [("a", 20), ("a", 30), ("a", 40)]
    assert all(batch.dropout_seeds is None for batch in step_passes(groups, 1000, torch.device("cpu")))


def test_a_family_that_cannot_be_checkpointed_takes_smaller_passes() -> None:
    assert plan((256, 0), longest=100, there=0) == PassPlan(256, 0)
    assert plan((1, 0), longest=100, there=0) == PassPlan(256, 0)
    assert plan((2048, 0), layers="full", there=0) == PassPlan(2048, 30)  # refused by name where it is switched on


def test_a_gpu_wants_larger_passes() -> None:
    assert plan((10**6, 0), device="cuda") == PassPlan(16384, 0)
    assert plan((4096, 3), device="cuda") == PassPlan(4096, 3)


def test_the_estimate_against_figures_made_by_hand() -> None:
    """SmolLM2-135M in 16 bits: 2 (2 d + 2 d_a + 2 d_kv + 2 f) + 4 h + 8 bytes a layer, 4 d where checkpointed."""
    layer = 2 * (2 * 576 + 2 * 576 + 2 * 192 + 2 * 1536) + 4 * 9 + 8
    assert layer_bytes_per_token(SMOLLM2) == layer == 11564
    assert layer_bytes_per_token(SMOLLM2, fast=False) == 2 * (2688 + 4 * 1536) + 8 * 576 + 8
    last = 4 * 576 + 4
    assert kept_bytes_per_token(SMOLLM2) == activation_bytes_per_token(SMOLLM2) == 30 * layer + last
    assert kept_bytes_per_token(SMOLLM2, 30) == 30 * 2304 + last  # 0.069 MB, the boundaries alone, in fp32
    assert kept_bytes_per_token(SMOLLM2, 30, fast=False) == 30 * 1152 + last
    assert activation_bytes_per_token(SMOLLM2, 30) == 30 * 2304 + last + layer
    assert activation_bytes_per_token(SMOLLM2, 12) == 18 * layer + 12 * 2304 + last + layer
    estimates = [activation_bytes_per_token(SMOLLM2, count) for count in range(1, 31)]
    assert estimates == sorted(estimates, reverse=True)
    assert layer_bytes_per_token(SMOLLM2, dropout=True) == layer
    plain = [layer_bytes_per_token(SMOLLM2, dropout, fast=False) for dropout in (True, False)]
    assert plain[0] - plain[1] == 2 * (3 * 576 + 576)  # q, k, v, gate and up have inputs of their own


def test_experts_that_a_token_visits_count_each() -> None:
    from transformers import MixtralConfig

    one, two = (layer_bytes_per_token(MixtralConfig(num_experts_per_tok=count)) for count in (1, 2))
    assert two - one == 2 * 2 * MixtralConfig().intermediate_size


@pytest.mark.parametrize("value", ["auto", "off", "full", 0, 12])
def test_the_option_as_it_is_written(value: str | int) -> None:
    assert TrainingConfig(activation_checkpointing=value).activation_checkpointing == value


def test_the_option_as_yaml_and_the_shell_give_it() -> None:
    assert TrainingConfig().activation_checkpointing == "auto"
    assert TrainingConfig(activation_checkpointing=False).activation_checkpointing == "off"  # type: ignore[arg-type]
    assert TrainingConfig(activation_checkpointing="12").activation_checkpointing == 12  # type: ignore[arg-type]
    for wrong in ("ful", True, -1, 2.5, None, "-1", [1]):
        with pytest.raises(ValueError, match="expected auto, off, full or a number of layers"):
            TrainingConfig(activation_checkpointing=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_loss_list_is_the_same_to_the_bit(family: str) -> None:
    """Six AdamW steps of two passes each, with dropout."""
    lists = []
    for count in (0, 1, 2):
        base = tiny_base(family)
        adapters = Adapters(base.module)
        adapters.add("a", AdapterConfig(r=4, lora_dropout=0.1))
        randomise(adapters, "a")
        adapters.train("a")
        checkpoint_layers(base, count)
        parameters = list(adapters.parameters("a").values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        results = []
        for step in range(6):
            passes = [learning_batch(sequences(part, seed=step), "a", step) for part in ((13, 7), (24, 1, 9))]
            [result] = train_step(base, [Learner("a", Sft(), parameters, optimizer, 1.0)], passes)
            assert isinstance(result, StepResult)
            results.append(result)
        lists.append([(result.loss, result.grad_norm) for result in results])
    assert lists[0] == lists[1] == lists[2]
    assert len(set(lists[0])) == 6


def measured(family: str, dropout: float = 0.0, **values: Any) -> Callable[[int], float]:
    """Bytes that autograd keeps per token by the number of checkpointed layers; wide enough for LoRA's to be few."""
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    same = {"n_embd": 128, "n_inner": 256, "ffn_dim": 256, "word_embed_proj_dim": 128}
    base = tiny_base(family, **(wide | same | values))
    adapters = Adapters(base.module)
    adapters.add("a", AdapterConfig(r=1, lora_dropout=dropout))
    adapters.train("a")
    batches = [learning_batch(sequences([length] * 2), "a") for length in (8, 24)]

    def kept(count: int) -> float:
        checkpoint_layers(base, count)
        return measured_bytes(base, batches[0], batches[1])

    kept.config = base.module.config  # type: ignore[attr-defined]
    return kept


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_kept_is_what_the_formula_says(dtype: torch.dtype, dropout: float) -> None:
    kept = measured("llama", dropout, dtype=dtype)
    config = kept.config  # type: ignore[attr-defined]
    config.dtype = dtype
    size = dtype.itemsize
    low_rank = 7 * size  # what the formula leaves out: r = 1 for each
    for count in range(3):
        expected = kept_bytes_per_token(config, count, dropout > 0) + (2 - count) * low_rank
        expected -= (4 - size) * 128 if count else 0  # what the embedding gives the first layer is in the model's type
        expected -= 0 if NATIVE else (2 - count) * 4 * config.num_attention_heads  # the kernel's sums of exponentials
        assert kept(count) == expected, count
    assert kept_bytes_per_token(config, 2) < kept_bytes_per_token(config, 0) / 3


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "opt", "mixtral", "qwen3_moe", "gpt_oss", "phi", "olmo2"])
def test_for_other_families_it_is_near_enough(family: str) -> None:
    kept = measured(family, dtype=torch.bfloat16)
    config = kept.config  # type: ignore[attr-defined]
    for count in (0, 1, 2):
        estimate = kept_bytes_per_token(config, count, fast=family in ("gemma3_text", "olmo2"))
        assert 0.25 * estimate <= kept(count) <= 1.4 * estimate, (count, kept(count) / estimate)
