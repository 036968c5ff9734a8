"""`topwork train` says in one line what the cheap checks find, and goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from run import tiny
from topwork.run.train import train, train_together

Make = Callable[..., Path]
SHORT = {"max_steps": 1, "eval_steps": 1}


def lint_lines(recipes: list[Path]) -> list[str]:
    from topwork.recipe.recipe import load_recipe

    lines: list[str] = []
    train_together([load_recipe(path) for path in recipes], log=lines.append)
    return [line for line in lines if line.startswith("lint:")]


def test_nothing_found(make_recipe: Make) -> None:
    (line,) = lint_lines([make_recipe(training=SHORT)])
    assert line.startswith("lint: nothing found by the quick checks")


def test_what_is_found_is_named_and_training_goes_on(make_recipe: Make, tmp_path: Path) -> None:
    made: list[dict[str, Any]] = tiny.rows(40)
    made[5]["messages"][1]["content"] = "It is grÃ¼n."
    path = tiny.write_rows(tmp_path / "damaged.jsonl", [*made, *made[:20]])
    lines: list[str] = []
    changes = {"train": str(path), "eval_fraction": 0.0}
    done = train(make_recipe(training={"max_steps": 1}, data=changes), log=lines.append)
    assert done.result["steps"] == 1
    (line,) = [line for line in lines if line.startswith("lint:")]
    assert line == ("lint: 2 warnings (duplicates 20, encoding-mojibake 2): topwork lint RECIPE shows them")


def test_recipes_on_the_same_data_are_told_once(make_recipe: Make) -> None:
    recipes = [make_recipe("one", training=SHORT), make_recipe("two", training=SHORT, adapter={"r": 2})]
    assert len(lint_lines(recipes)) == 1


def test_plain_text_that_is_cut_in_pieces_is_no_fault(make_recipe: Make, tmp_path: Path) -> None:
    rows = [{"text": f"Story {number}. " + "The lamp is dark. " * 12} for number in range(12)]
    path = tiny.write_rows(tmp_path / "stories.jsonl", rows)
    data = {"train": str(path), "too_long": "split", "max_length": 64, "eval_fraction": 0.0}
    (line,) = lint_lines([make_recipe("cut", training={"max_steps": 1}, data=data)])
    assert line == "lint: nothing found by the quick checks"
    path = tiny.write_rows(tmp_path / "stories.jsonl", [*rows, *rows[:6]])
    (line,) = lint_lines([make_recipe("twice", training={"max_steps": 1}, data=data)])
    assert line == "lint: 1 warning (duplicates 6): topwork lint RECIPE shows it"
