"""What needs no weights is told before any are read: rows that are missing, bad or too long."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import topwork.models.load as loading
import topwork.run.loading
import topwork.run.session
from topwork.common.errors import AdapterError, DataError, ModelError
from topwork.models.config import ModelConfig
from topwork.models.tokenizer import open_tokenizer
from topwork.recipe.recipe import load_recipe
from topwork.run.evaluate import evaluate, evaluate_model
from topwork.run.merge import merge
from topwork.run.session import open_session
from topwork.run.train import train, train_together

MakeRecipe = Callable[..., Path]


def quiet(_: str) -> None:
    pass


@pytest.fixture
def bases(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the bases that were loaded, filled as they are."""
    loaded: list[str] = []

    def counted(config: ModelConfig, *rest: Any) -> Any:
        loaded.append(config.model_name_or_path)
        return loading.load_base(config, *rest)

    for module in (topwork.run.session, topwork.run.loading):
        monkeypatch.setattr(module, "load_base", counted)
    return loaded


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": {"train": "nowhere.jsonl"}}, "nowhere.jsonl does not exist"),
        ({"data": {"train": ["ROWS", {"path": "nowhere.jsonl"}]}}, "nowhere.jsonl does not exist"),
        ({"data": {"eval": "nowhere.csv"}}, "nowhere.csv does not exist"),
        ({"data": {"max_length": 16}}, "are longer than 16 tokens"),
        ({"data": {"columns": {"prompt": "nothing"}}}, "'nothing', which the data does not have"),
        ({"evaluation": {"data": "nowhere.jsonl"}}, "nowhere.jsonl does not exist"),
    ],
)
def test_rows_are_told_before_the_base_is_loaded(
    make_recipe: MakeRecipe, tickets: Path, bases: list[str], changes: dict[str, Any], told: str
) -> None:
    if isinstance(changes.get("data", {}).get("train"), list):
        changes = {"data": {"train": [str(tickets), *changes["data"]["train"][1:]]}}
    with pytest.raises(DataError, match=told):
        train(make_recipe(**changes), log=quiet)
    assert bases == []


def test_a_target_is_told_before_rows_and_base_are_read(make_recipe: MakeRecipe, bases: list[str]) -> None:
    with pytest.raises(AdapterError, match=r"q_prj.*did you mean 'q_proj'"):
        train(make_recipe(adapter={"target_modules": ["q_prj"]}, data={"train": "nowhere.jsonl"}), log=quiet)
    assert bases == []


def test_a_base_that_is_wrong_is_told_before_its_rows_are_read(make_recipe: MakeRecipe, bases: list[str]) -> None:
    with pytest.raises(ModelError, match="no model 'smolm2-135m'"):
        train(make_recipe(model={"model_name_or_path": "smolm2-135m"}), log=quiet)
    assert bases == []


def test_the_tokenizer_that_read_the_rows_is_the_bases(make_recipe: MakeRecipe, bases: list[str]) -> None:
    recipe = load_recipe(make_recipe(training={"max_steps": 1}))
    train_together([recipe], log=quiet)
    assert bases == [recipe.model.model_name_or_path]
    on = open_session(recipe, quiet)
    tokenizer, length = open_tokenizer(recipe.model)
    assert (length, tokenizer.get_vocab()) == (on.base.context_length, on.base.tokenizer.get_vocab())


def test_a_given_base_is_not_loaded_again(make_recipe: MakeRecipe, bases: list[str]) -> None:
    on = open_session(load_recipe(make_recipe()), quiet)
    train_together([load_recipe(make_recipe("again", training={"max_steps": 1}))], log=quiet, on=on)
    assert len(bases) == 1


def test_scored_rows_are_told_before_the_base_is_loaded(trained: Path, tickets: Path, bases: list[str]) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        evaluate(trained, "nowhere.jsonl", log=quiet)
    recipe = load_recipe(trained / "recipe.yaml")
    asked = recipe.evaluation.model_copy(update={"data": "nowhere.jsonl"})
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        evaluate_model(recipe.model, recipe.data, asked, log=quiet)
    assert bases == []
    assert evaluate(trained, str(tickets), max_rows=2, log=quiet)["rows"] == 2
    assert len(bases) == 1


def test_named_rows_that_are_gone_are_told_before_a_merge_loads_the_base(
    trained: Path, tmp_path: Path, bases: list[str]
) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        merge(trained, tmp_path / "merged", data="nowhere.jsonl", log=quiet)
    assert bases == []
