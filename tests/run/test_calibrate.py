"""Measuring steps: that real ones of the right models are run, and kept. Never how long they take."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from run.tiny import write_model
from topwork.common.errors import RequestError
from topwork.plan import calibrations
from topwork.plan.base import structure_named
from topwork.plan.calibration import Question, rows_of
from topwork.plan.setup import setup_of
from topwork.recipe.recipe import Recipe, make_recipe
from topwork.run import calibrate as module
from topwork.run.calibrate import calibrate, calibrate_machine
from topwork.training.step import train_step

LENGTHS = [(12, 5), (7, 3), (20, 10), (5, 1)]
LAYERS, FEW, ROUNDS = 4, 2, 4


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For measurements alone: kernels that are compiled already stay where they are."""
    monkeypatch.setattr(calibrations, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setattr(module, "MOST_ROUNDS", ROUNDS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config alone counts: the weights are taken away."""
    folder = write_model(tmp_path_factory.mktemp("llama") / "base", num_hidden_layers=LAYERS)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(layers, checkpointed ones, learners) of every step that is taken."""
    taken = []

    def told(base: Any, learners: Any, passes: Any) -> Any:
        layers = base.module.model.layers
        again = sum(layer.gradient_checkpointing for layer in layers)
        before = [parameter.detach().clone() for parameter in learners[0].parameters]
        results = train_step(base, learners, passes)
        moved = any(not torch.equal(old, new) for old, new in zip(before, learners[0].parameters))
        assert moved
        assert all(result.loss > 0 for result in results)
        taken.append((len(layers), again, len(learners)))
        return results

    monkeypatch.setattr(module, "train_step", told)
    return taken


def ticking(seconds: float = 1.0) -> Any:
    """A clock that goes on by as much every time it is looked at."""
    numbers = count()
    return lambda: seconds * next(numbers)


def asked(llama: Path, members: int = 1, checkpointed: int = 0, **sections: Any) -> tuple[list[Recipe], Question]:
    values = {"model": {"model_name_or_path": str(llama), "dtype": "float32"}, "data": {"train": "none"}, **sections}
    recipes = [make_recipe(values)] * members
    setup = setup_of(recipes, structure_named(recipes[0].model))
    return recipes, Question(setup, rows_of(LENGTHS), 2, 32, checkpointed)


@pytest.fixture
def few_layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if no more than two layers were to be had in memory."""
    monkeypatch.setattr(module, "_most_layers", lambda _: FEW)
    return


def test_the_whole_of_a_small_model_takes_real_steps(llama: Path, steps: list[tuple[int, int, int]]) -> None:
    told: list[str] = []
    recipes, question = asked(llama)
    found = calibrate(recipes, question, LENGTHS, 1e6, told.append, ticking())
    assert steps == [(LAYERS, 0, 1)] * (1 + ROUNDS)
    assert found.exact
    assert found.seconds == 2.0  # the clock is looked at when a step begins, after its passes and at its end
    assert any("4 of the base's 4 layers" in line for line in told)


@pytest.mark.usefixtures("few_layers")
def test_models_of_few_layers_take_turns(llama: Path, steps: list[tuple[int, int, int]]) -> None:
    recipes, question = asked(llama)
    calibrate(recipes, question, LENGTHS, 1e6, lambda _: None, ticking())
    warm, rounds = steps[:2], steps[2:]
    assert warm == [(1, 0, 1), (FEW, 0, 1)]
    assert rounds[:4] == [(FEW, 0, 1), (1, 0, 1), (1, 0, 1), (FEW, 0, 1)]
    assert len(rounds) == 2 * ROUNDS


@pytest.mark.usefixtures("few_layers")
@pytest.mark.parametrize(
    ("checkpointed", "models"),
    [(3, [(1, 0), (FEW, 0), (FEW, FEW)]), (LAYERS, [(1, 1), (FEW, FEW)])],
    ids=["some", "all"],
)
def test_layers_are_checkpointed_as_the_run_will(
    llama: Path, steps: list[tuple[int, int, int]], checkpointed: int, models: list[tuple[int, int]]
) -> None:
    recipes, question = asked(llama, checkpointed=checkpointed)
    calibrate(recipes, question, LENGTHS, 1e6, lambda _: None, ticking())
    assert [(layers, again) for layers, again, _ in steps[: len(models)]] == models


def test_time_that_is_up_ends_it_after_some_rounds(llama: Path, steps: list[tuple[int, int, int]]) -> None:
    recipes, question = asked(llama)
    calibrate(recipes, question, LENGTHS, 1e-3, lambda _: None, ticking())
    assert len({layers for layers, _, _ in steps}) == 2
    assert len(steps) == 2 + 2 * module.LEAST_ROUNDS


KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"quantization": {"load_in_4bit": True, "head": "int8"}},
    "int8": {"quantization": {"load_in_8bit": True}},
    "dora": {"adapter": {"use_dora": True, "lora_dropout": 0.1}},
    "pissa": {"adapter": {"init_lora_weights": "pissa"}},
    "some layers": {"adapter": {"layers_to_transform": [3]}},
    "ia3": {"adapter": {"method": "ia3"}},
    "prompt": {"adapter": {"method": "prompt", "prompt_tuning_init": "text", "prompt_tuning_init_text": "Tell me"}},
    "prefix": {"adapter": {"method": "prefix"}},
    "full 8bit": {"adapter": {"method": "full"}, "training": {"optim": "adamw_8bit"}},
    "head saved": {"adapter": {"modules_to_save": ["lm_head"]}},
}


@pytest.mark.usefixtures("few_layers")
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_and_every_way_of_holding_the_base(
    llama: Path, steps: list[tuple[int, int, int]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_ROUNDS", 1)
    recipes, question = asked(llama, **KINDS[kind])
    assert calibrate(recipes, question, LENGTHS, 1e6, lambda _: None, ticking()).exact
    assert len(steps) == 4


def test_members_train_together(
    llama: Path, steps: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_ROUNDS", 1)
    recipes, question = asked(llama, members=3)
    calibrate(recipes, question, LENGTHS, 1e6, lambda _: None, ticking())
    assert set(steps) == {(LAYERS, 0, 3)}


def test_what_does_not_fit_into_memory_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        bytes = 1 << 20

    monkeypatch.setattr(module, "free_memory", lambda _: Nothing)
    recipes, question = asked(llama)
    with pytest.raises(RequestError, match="needs two layers in memory"):
        calibrate(recipes, question, LENGTHS)


def test_what_was_found_is_kept(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROUNDS", 2)
    recipes, question = asked(llama)
    calibrate(recipes, question, LENGTHS, 1e6, lambda _: None, ticking())
    (path,) = (tmp_path / "cache" / "speeds").glob("*.json")
    record = json.loads(path.read_text("utf-8"))
    assert record["measured"]["step"] == 2.0
    assert record["measured"]["rounds"] == 2
    assert record["key"] == question.key()
    assert record["machine"]["torch"] == torch.__version__.partition("+")[0] or record["machine"]["torch"]


def test_a_machines_general_rates_are_of_lora_in_16_and_4_bits(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    asked_for: list[Question] = []
    monkeypatch.setattr(module, "calibrate", lambda _, question, *__: asked_for.append(question) or question)
    calibrate_machine(10.0, lambda _: None)
    assert [question.setup.quantization.load_in_4bit for question in asked_for] == [False, True]
    assert {question.setup.structure.hidden for question in asked_for} == {576}
    assert replace(asked_for[0], setup=asked_for[1].setup) == asked_for[1]
