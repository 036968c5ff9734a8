"""Pass sizes and checkpointed layers follow from free memory; training depends on neither."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch

from reference.families import learning_batch, randomise, sequences, tiny_base
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.common.errors import RecipeError
from topwork.data.batches import AdapterRows
from topwork.data.examples import Example
from topwork.models.checkpointing import checkpoint_layers
from topwork.models.config import ModelConfig
from topwork.objectives.sft import Sft
from topwork.plan.base import structure_named
from topwork.plan.setup import setup_of
from topwork.recipe.recipe import make_recipe
from topwork.training.config import Checkpointing, TrainingConfig
from topwork.training.memory import MARGIN, SMALLEST_PASS, PassShape, largest_pass, moments
from topwork.training.passes import Memory, PassPlan, plan_passes, step_passes
from topwork.training.step import Learner, StepResult, train_step
from topwork.training.together import members_that_fit

SMOLLM2 = structure_named(ModelConfig(model_name_or_path="smollm2-135m"))
LAYERS = 30


def memory(there: int = LAYERS, device: Literal["cpu", "cuda"] = "cpu", total_bytes: int = 0, **adapter: Any) -> Memory:
    """LoRA on SmolLM2's shape, of which so many layers can be checkpointed."""
    recipe = make_recipe({
        "model": {"model_name_or_path": "smollm2-135m", "dtype": "bfloat16"}, "data": {"train": "rows"},
        "adapter": adapter,
    })  # fmt: skip
    setup = setup_of([recipe], replace(SMOLLM2, checkpointable=there), device)
    return Memory(setup, total_bytes)


def plan(
    needed: tuple[int, int],
    tokens: int | None = None,
    layers: Checkpointing = "auto",
    longest: int = 300,
    there: int = LAYERS,
    spare: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
) -> PassPlan:
    """With just the memory that so many tokens with so many layers need."""
    total = memory(there, device).needed_bytes(*needed) + spare
    return plan_passes(tokens, layers, longest, memory(there, device, total))


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
    assert plan((512, 0), layers="full") == PassPlan(1024, 30)
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


def test_training_and_the_plan_ask_the_same_function() -> None:
    """What `topwork plan` prints is what passes are chosen by, with the margin."""
    known = memory()
    peak = max(usage.bytes for usage in moments(known.setup, PassShape(1024, 1024, 1024), 3))
    assert known.needed_bytes(1024, 3) == round(MARGIN["cpu"] * peak)
    assert largest_pass(known.setup, known.needed_bytes(1024, 0), 1.0, 300) == (1024, 0)
    assert largest_pass(known.setup, known.needed_bytes(1024, 0) - 1, 1.0, 300) == (512, 0)
    assert largest_pass(known.setup, known.needed_bytes(256, 29) - 1, 1.0, 256) is None


def test_members_that_do_not_fit_beside_a_pass_wait() -> None:
    one = memory()
    three = replace(one.setup, members=one.setup.members * 3)
    two = replace(three, members=three.members[:2])
    total = Memory(two, 0).needed_bytes(SMALLEST_PASS, 29)
    assert members_that_fit(three, total, None, "auto") == 2
    assert members_that_fit(three, total, None, "auto", longest=2 * SMALLEST_PASS) == 1  # it has to hold that too
    assert members_that_fit(three, 10 * total, None, "auto") == 3
    assert members_that_fit(three, 0, None, "auto") == 1
    assert members_that_fit(three, total, 4096, "off") == 1


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
