"""Where a recipe's paths are looked for, and what is made of `~`."""

from pathlib import Path

import pytest
import yaml

from topwork.common.errors import RecipeError
from topwork.recipe.grid import grid_axes, parse_grid
from topwork.recipe.recipe import Recipe, load_recipe, make_recipe
from topwork.recipe.sweep_config import expand, load_sweep

VALUES = {"model": {"model_name_or_path": "some/model"}, "data": {"train": "rows.jsonl"}}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The recipe's folder and the current one, each with rows.jsonl; what is asked is in one of them alone."""
    beside, here, home = tmp_path / "beside", tmp_path / "here", tmp_path / "home"
    for folder in (beside, here, home):
        folder.mkdir()
        (folder / "rows.jsonl").touch()
    (beside / "old.jsonl").touch()
    (here / "new.jsonl").touch()
    (here / "runs").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    (beside / "recipe.yaml").write_text(yaml.safe_dump(VALUES), "utf-8")
    return beside, here


def test_who_names_a_path_decides_where_it_is_looked_for(places: tuple[Path, Path]) -> None:
    beside, here = places
    recipe = beside / "recipe.yaml"
    assert load_recipe(recipe).data.train == str(beside / "rows.jsonl")
    assert load_recipe(recipe, ["data.train=rows.jsonl"]).data.train == str(here / "rows.jsonl")
    assert load_recipe(recipe, ["data.train=old.jsonl"]).data.train == str(beside / "old.jsonl")
    several = load_recipe(recipe, ["data.train=[{path: rows.jsonl, weight: 2}, old.jsonl, '*.jsonl']"]).data
    assert [source.path for source in several.sources(several.train)] == [
        str(here / "rows.jsonl"), str(beside / "old.jsonl"), str(here / "*.jsonl"),
    ]  # fmt: skip
    assert load_recipe(recipe, ["data={train: rows.jsonl}"]).data.train == str(here / "rows.jsonl")
    assert load_recipe(recipe, ["evaluation.data=rows.jsonl"]).evaluation.data == str(here / "rows.jsonl")
    assert load_recipe(recipe, ["output_dir=runs/x"]).output_dir == "runs/x"


def test_so_it_is_in_a_sweep(places: tuple[Path, Path]) -> None:
    beside, here = places
    request = load_sweep(beside / "recipe.yaml", ["evaluation.data=rows.jsonl"])
    grid = parse_grid(["data.train=rows.jsonl,old.jsonl"])
    trials = expand(request, grid_axes(grid, grid), Path("out"))
    assert [trial.recipe.data.train for trial in trials] == [str(here / "rows.jsonl"), str(beside / "old.jsonl")]
    assert [trial.name for trial in trials] == ["train-rows.jsonl", "train-old.jsonl"]
    assert trials[0].recipe.evaluation.data == str(here / "rows.jsonl")
    of_file = expand(request, grid_axes(grid), Path("out"))
    assert of_file[0].recipe.data.train == str(beside / "rows.jsonl")
    jobs = load_sweep(beside / "recipe.yaml", ["jobs=[{name: a, data: {train: rows.jsonl}}, {name: b}]"])
    assert [trial.recipe.data.train for trial in expand(jobs, (), Path("out"))] == [
        str(here / "rows.jsonl"), str(beside / "rows.jsonl"),
    ]  # fmt: skip


@pytest.mark.parametrize("override", [True, False])
@pytest.mark.parametrize("key", ["data.train", "data.eval", "evaluation.data", "data.chat_template",
                                 "model.model_name_or_path", "output_dir"])  # fmt: skip
def test_a_home_is_expanded(key: str, override: bool, places: tuple[Path, Path]) -> None:
    beside, here = places
    section, _, option = key.partition(".")
    values = {**VALUES, section: {**VALUES.get(section, {}), option: "~/rows.jsonl"} if option else "~/rows.jsonl"}
    path = beside / "home.yaml"
    path.write_text(yaml.safe_dump(VALUES if override else values), "utf-8")
    recipe = load_recipe(path, [f"{key}=~/rows.jsonl"] if override else []).model_dump()
    assert (recipe[section][option] if option else recipe[section]) == str(here.parent / "home" / "rows.jsonl")


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("~nobody-of-this-name/runs", "~nobody-of-this-name is no home"),
        ("$HOME/runs", r"variables \(\$HOME\) are not expanded"),
        ("${SCRATCH}/runs", r"variables \(\$\{SCRATCH\}\) are not expanded"),
        ("%USERPROFILE%/runs", r"variables \(%USERPROFILE%\) are not expanded"),
        ("runs\\new", "folders are parted by /"),
        (" ", "output_dir is empty"),
    ],
)
def test_an_output_dir_that_would_be_a_folder_of_an_odd_name(
    named: str, told: str, places: tuple[Path, Path]
) -> None:  # fmt: skip
    with pytest.raises(RecipeError, match=told):
        load_recipe(places[0] / "recipe.yaml", [f"output_dir='{named}'"])
    with pytest.raises(RecipeError, match=told):
        make_recipe({**VALUES, "output_dir": named}, folder=Path())


def test_a_recipe_of_python_goes_home_too(places: tuple[Path, Path]) -> None:
    recipe = Recipe(model={"model_name_or_path": "a/b"}, data={"train": "x"}, output_dir="~/runs")  # type: ignore[arg-type]
    assert recipe.output_dir == str(places[1].parent / "home" / "runs")


def test_a_recipe_that_is_not_there(places: tuple[Path, Path]) -> None:
    with pytest.raises(RecipeError, match=r"did you mean '.*recipe\.yaml'"):
        load_recipe(places[0] / "recipes.yaml")
    assert load_recipe(Path("~/../beside/recipe.yaml")).data.train.endswith("rows.jsonl")
