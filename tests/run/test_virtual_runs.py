"""Runs of prompt and prefix tuning: learned tokens take room in every pass and in the context."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from run import tiny
from topwork.common.errors import DataError, RecipeError, RequestError
from topwork.data.config import DataConfig
from topwork.data.examples import load_data
from topwork.run.evaluate import evaluate
from topwork.run.sweep.plan import SweepOptions, plan_sweep
from topwork.run.train import train

VIRTUAL = 10
METHODS = ["prompt", "prefix"]
Recipes = Callable[..., Path]


@pytest.fixture
def virtual_recipe(tiny_llama: Path, tickets: Path, tmp_path: Path) -> Recipes:
    """virtual_recipe("prompt", **changes): a recipe of that method."""

    def make(method: str, name: str = "run", rows: Path = tickets, **changes: Any) -> Path:
        training = {
            "learning_rate": 0.5,
            "max_steps": 24,
            "lr_scheduler_type": "constant",
            **changes.pop("training", {}),
        }
        values = tiny.recipe_values(tiny_llama, rows, tmp_path / name, training=training, **changes)
        adapter = {"method": method, "num_virtual_tokens": VIRTUAL}
        return tiny.write_recipe(tmp_path / f"{name}.yaml", values | {"adapter": adapter})

    return make


def silent(_: str) -> None:
    """A report that nobody reads."""


def longest_of(rows: Path, base: Path) -> int:
    config = DataConfig.model_validate({"train": str(rows), "eval_fraction": 0.0, "max_length": 10 * tiny.CONTEXT})
    return load_data(config, AutoTokenizer.from_pretrained(base), 10 * tiny.CONTEXT, 0, silent).longest()


def write_long_row(path: Path, base: Path, tokens: int) -> Path:
    """Rows of which one has so many tokens."""

    def written(words: int) -> Path:
        asked = "Order " + "7" * words
        long = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "yes"}]}
        return tiny.write_rows(path, [*tiny.rows(12), long])

    begun = longest_of(written(tokens // 2), base)
    assert longest_of(written(tokens // 2 + tokens - begun), base) == tokens
    return path


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_is_scored(method: str, virtual_recipe: Recipes) -> None:
    run = train(virtual_recipe(method, evaluation={"max_rows": None}), log=silent)
    assert run.result["eval_loss_after"] < run.result["eval_loss_before"] - 0.005
    found = evaluate(run.folder, log=silent)
    assert found["after"]["loss"] == pytest.approx(run.result["eval_loss_after"], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_pass_has_room_for_the_longest_row_and_its_learned_tokens(
    method: str, virtual_recipe: Recipes, tiny_llama: Path, tickets: Path, tmp_path: Path
) -> None:
    longest = longest_of(tickets, tiny_llama) + VIRTUAL
    one_less = virtual_recipe(method, training={"tokens_per_pass": longest - 1, "max_steps": 1})
    with pytest.raises(RecipeError, match=f"the longest sequence has {longest} tokens"):
        train(one_less, log=silent)
    with pytest.raises(RecipeError, match=f"the longest sequence has {longest} tokens"):
        plan_sweep(one_less, (), SweepOptions(("training.learning_rate=0.1,0.01",)))
    assert not list(tmp_path.glob("run*/"))
    assert train(virtual_recipe(method, training={"tokens_per_pass": longest, "max_steps": 1}), log=silent)


@pytest.mark.parametrize("method", METHODS)
def test_the_context_has_room_for_a_row_and_its_learned_tokens(
    method: str, virtual_recipe: Recipes, tiny_llama: Path, tmp_path: Path
) -> None:
    run = train(virtual_recipe(method, training={"max_steps": 1}), log=silent)
    room = tiny.CONTEXT - VIRTUAL
    options: dict[str, Any] = {"data": {"max_length": tiny.CONTEXT}, "training": {"tokens_per_pass": tiny.CONTEXT}}
    for tokens in (room, room + 1):
        rows = write_long_row(tmp_path / f"{tokens}.jsonl", tiny_llama, tokens)
        if tokens == room:
            assert json.dumps(evaluate(run.folder, data=str(rows), log=silent))
            assert train(virtual_recipe(method, "fits", rows, **options), log=silent)
            continue
        told = f"longest has {tokens}"
        with pytest.raises(DataError, match=told):
            evaluate(run.folder, data=str(rows), log=silent)
        recipe = virtual_recipe(method, "long", rows, **options)
        with pytest.raises(DataError, match=told):
            train(recipe, log=silent)
        with pytest.raises((DataError, RequestError), match=told):
            plan_sweep(recipe, (), SweepOptions(("training.learning_rate=0.1,0.01",)))
        assert not list(tmp_path.glob("long*/"))
