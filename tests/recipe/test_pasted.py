"""Options as messages print them, in a recipe and behind `--set`."""

from pathlib import Path

import pytest

from topwork.common.errors import RecipeError
from topwork.recipe.pasted import setting
from topwork.recipe.recipe import load_recipe

BEGIN = "model:\n  model_name_or_path: some/model\ndata:\n  train: rows.jsonl\n"


def loaded(folder: Path, text: str, *overrides: str):  # type: ignore[no-untyped-def]
    (folder / "recipe.yaml").write_text(text, "utf-8")
    return load_recipe(folder / "recipe.yaml", overrides)


def test_a_dotted_key_is_taken_at_the_top_in_its_section_and_without_one(tmp_path: Path) -> None:
    for text in (
        BEGIN + "data.max_length: 64\ntraining.seed: 3\n",
        BEGIN + "  data.max_length: 64\ntraining:\n  training.seed: 3\n",
        "model.model_name_or_path: some/model\ndata.train: rows.jsonl\ndata:\ndata.max_length: 64\ntraining.seed: 3\n",
        BEGIN + "training: {batch_size: 8}\ntraining.seed: 3\ndata.max_length: 64\nadapter.rank_pattern: {a.b: 2}\n",
    ):
        recipe = loaded(tmp_path, text)
        assert (recipe.data.train, recipe.data.max_length, recipe.training.seed) == ("rows.jsonl", 64, 3)
        assert recipe.adapter.rank_pattern == ({"a.b": 2} if "pattern" in text else {})


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("  max_length: 8\ndata.max_length: 64\n", "'data.max_length' is given twice"),
        ("  data.max_length: 8\ndata.max_length: 64\n", "'data.max_length' is given twice"),
        ("training: fast\ntraining.seed: 1\n", "'training.seed' is given beside 'training', which is a value"),
        ("data.max_lenght: 64\n", "unknown key 'data.max_lenght'; did you mean 'max_length'?"),
        ("daat.max_length: 64\n", "unknown key 'daat.max_length'"),
    ],
)
def test_what_cannot_be_is_told(more: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(tmp_path, BEGIN + more)
    assert told in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("a.b=c", ("a.b", "c")),
        ("a.b: c", ("a.b", "c")),
        ('a.b: {x: "y=z"}', ("a.b", '{x: "y=z"}')),
        ('a.b={x: "y: z"}', ("a.b", '{x: "y: z"}')),
        ("a.b=", ("a.b", "")),
        ("a.b:c=d", ("a.b:c", "d")),
        ("a.b:", None),
        ("=c", None),
        ("a.b", None),
    ],
)
def test_settings(given: str, parts: tuple[str, str] | None) -> None:
    assert setting(given) == parts


def test_what_is_set_replaces_what_the_recipe_says(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, BEGIN + "data.columns: {prompt: a}\n", 'data.columns: {prompt: "b c", completion: d}')
    assert recipe.data.columns == {"prompt": "b c", "completion": "d"}
