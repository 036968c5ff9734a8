"""What is told before a run begins: a plan in five lines, and where it is too little to mean anything."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from run import tiny
from run.fixtures import Said
from topwork.recipe.recipe import load_recipe
from topwork.run.beforehand import (
    FEW_HELD_OUT,
    FEW_LEARNED_TOKENS,
    FEW_ROWS,
    FEW_STEPS,
    MANY_EPOCHS,
    SHOWN,
    Beforehand,
)
from topwork.run.train import train, train_together
from topwork.training.progress import Silent

Recipes = Callable[..., Path]
PLAN = ("train: ", "eval", "steps: ", "on the way: ", "learning rate: ")
SHORT: dict[str, Any] = {"max_steps": 1, "eval_steps": 1}
ENOUGH = Beforehand(
    sequences=FEW_ROWS, held_out_rows=FEW_HELD_OUT, tokens=90_000, learned_tokens=FEW_LEARNED_TOKENS, longest=90,
    batch_size=16, steps=FEW_STEPS, epochs=1.0, eval_steps=1, save_steps=1, learning_rate=2e-4,
    lr_scheduler_type="cosine", warmup_steps=1,
)  # fmt: skip


class Heard(Silent):
    """Writes down when it is told of the first validation and step, among the lines."""

    def __init__(self, said: list[str]) -> None:
        self.said = said

    def validated(self, step: int, record: dict[str, Any]) -> None:
        self.said.append(f"validated {step}")

    def stepped(self, step: int, record: dict[str, Any]) -> None:
        self.said.append(f"stepped {step}")


def plan_lines(said: list[str]) -> list[str]:
    return [line for line in said if line.startswith(PLAN)]


def test_five_lines_say_before_the_first_step_what_the_run_then_does(make_recipe: Recipes) -> None:
    said: list[str] = []
    options = {"num_train_epochs": 2.5, "max_steps": None, "warmup_steps": 3, "learning_rate": 2.5e-4}
    result = train(make_recipe(training=options), progress=Heard(said), log=said.append).result
    before = said[: said.index("validated 0")]
    assert plan_lines(said) == plan_lines(before) == before[before.index(plan_lines(said)[0]) :][:5]
    doing = [line for line in before if line.endswith(" ...")]
    words = (
        "opening the tokenizer of ",
        "reading the rows: ",
        "reading the base: ",
        "validating before the first step",
    )
    assert len(doing) == len(words)
    assert all(line.startswith(word) for line, word in zip(doing, words))
    rows, held, steps, way, rate = plan_lines(said)
    assert rows.startswith("train: 36 rows -> 36 sequences; ")
    assert held.startswith("eval (held out by seed): 4 rows")
    tokens = sum(int(part.split()[0].replace(",", "")) for part in (rows.split("; ")[1],)) * 22.5 / 9
    assert steps == f"steps: 22 of 4 rows = 2.44 epochs, about {tokens * 22 / 22.5:,.0f} tokens"
    assert way == "on the way: validated every 6 steps, saved every 2 steps"
    assert rate == "learning rate: 2.5e-4, cosine, warm-up 3 steps"
    assert result["plan"]["steps"] == result["steps"] == 22
    assert (result["plan"]["sequences"], result["plan"]["held_out_rows"], result["plan"]["warmup_steps"]) == (36, 4, 3)
    assert sum(line.startswith(f"stepped {result['plan']['steps']}") for line in said) == 1


def test_what_is_too_little_is_said_once_and_stands_in_the_result(make_recipe: Recipes) -> None:
    said: list[str] = []
    recipe = make_recipe(data={"eval_fraction": 0.0}, training=SHORT | {"batch_size": 64, "tokens_per_pass": None})
    run = train(recipe, log=said.append)
    kept = json.loads((run.folder / "result.json").read_text("utf-8"))
    told = [line.removeprefix("warning: ") for line in said if line.startswith("warning: ")]
    for words in ("1 optimizer step is hardly", "no rows are held out", "40 rows to train on and a batch of 64"):
        assert sum(words in line for line in told) == 1
        assert sum(words in line for line in kept["warnings"]) == 1
    assert "eval: no rows are held out" in said
    assert kept["plan"] == run.result["plan"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": FEW_STEPS - 1}, "9 optimizer steps are hardly a training"),
        ({"held_out_rows": FEW_HELD_OUT - 1}, "19 rows are held out"),
        ({"held_out_rows": 0}, "no rows are held out"),
        ({"batch_size": FEW_ROWS + 1}, "each step sees all there is"),
        ({"learned_tokens": FEW_LEARNED_TOKENS - 1}, "999 tokens to learn"),
        ({"epochs": 0.4}, "the run ends after 0.4 of an epoch"),
        ({"epochs": MANY_EPOCHS + 1.0, "sequences": FEW_ROWS - 1}, "each of 999 rows is seen 11 times"),
    ],
)
def test_each_threshold(change: dict[str, Any], words: str) -> None:
    assert ENOUGH.warnings() == []
    (told,) = replace(ENOUGH, **change).warnings()
    assert words in told


@pytest.mark.parametrize("change", [{"epochs": None}, {"epochs": 400.0}, {"tokens": None, "learned_tokens": None}])
def test_what_is_not_known_or_is_much_is_no_warning(change: dict[str, Any]) -> None:
    assert replace(ENOUGH, **change).warnings() == []


def test_a_program_reads_one_object_and_people_the_lines(topwork: Callable[..., Said], make_recipe: Recipes) -> None:
    said = topwork("train", make_recipe(training=SHORT), "--json")
    assert json.loads(said.out)["plan"]["steps"] == 1
    assert len(plan_lines(said.err.splitlines())) == 5


def test_streamed_rows_are_told_as_far_as_they_are_known(make_recipe: Recipes) -> None:
    said: list[str] = []
    recipe = make_recipe(data={"streaming": True, "max_length": 300}, training=SHORT)
    result = train(recipe, log=said.append).result
    assert "steps: 1 of 4 rows = 0.11 of an epoch" in said
    assert (result["plan"]["sequences"], result["plan"]["tokens"], result["plan"]["longest"]) == (36, None, 300)


def test_adapters_that_train_together_share_what_is_alike(make_recipe: Recipes) -> None:
    rates = [1e-3, 2e-3, 2e-3, 3e-3, 4e-3, 5e-3]
    adapter = {"r": 1, "target_modules": ["q_proj"]}
    paths = [
        make_recipe(f"m{at}", adapter=adapter, training=SHORT | {"learning_rate": rate})
        for at, rate in enumerate(rates)
    ]
    said: list[str] = []
    runs = train_together([load_recipe(path) for path in paths], log=said.append)
    shared = [line for line in plan_lines(said) if not line.startswith("learning rate")]
    assert len(shared) == 4
    assert len([line for line in said if "hardly a training" in line]) == 1
    own = [line for line in said if line.startswith("learning rate: ")]
    assert own[:2] == [
        "learning rate: 1e-3, cosine, warm-up 1 step (m0)",
        "learning rate: 2e-3, cosine, warm-up 1 step (m1, m2)",
    ]
    assert len(own) == SHOWN
    assert said[said.index(own[-1]) + 1] == "... and others of 2 adapters: `plan` in their result.json"
    assert [run.result["plan"]["learning_rate"] for run in runs] == rates


def test_a_run_that_goes_on_does_not_say_it_again(make_recipe: Recipes) -> None:
    path, said = make_recipe(training={"max_steps": 4, "save_steps": 2}), list[str]()
    recipe = load_recipe(path)
    train_together([recipe], log=lambda _: None, stop_at=2)
    (run,) = train_together([recipe], resume=True, log=said.append)
    assert plan_lines(said) == []
    assert sum("hardly a training" in line for line in run.result["warnings"]) == 1
    assert tiny.folder_bytes(run.folder)["result.json"]
