"""Sweeps as recipes: what a grid's text means, which members it gives, what jobs are, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from topwork.common.errors import RecipeError, RequestError
from topwork.recipe.grid import axis_values, grid_axes, parse_grid, safe_name, seed_axis
from topwork.recipe.recipe import load_recipe
from topwork.recipe.sweep_config import PlannedTrial, expand, make_sweep

BASE: dict[str, Any] = {"model": {"model_name_or_path": "some/model"}, "data": {"train": "rows.jsonl"}}
OUT = Path("runs/out")


def trials(grid: dict[str, Any], seeds: int = 1, **sections: Any) -> list[PlannedTrial]:
    axes = grid_axes(grid) + ([seed_axis(seeds)] if seeds > 1 else [])
    return expand(make_sweep({**BASE, **sections}), axes, OUT)


@pytest.mark.parametrize(
    ("key", "text", "values"),
    [
        ("adapter.r", "2,4,8", [2, 4, 8]),
        ("adapter.r", "2..8:3", [2, 5, 8]),
        ("adapter.r", "2..9:3", [2, 5, 8]),
        ("adapter.r", "2..64*6", [2, 4, 8, 16, 32, 64]),
        ("adapter.r", "1..4*6", [1, 2, 3, 4]),  # whole, and each once
        ("adapter.r", "4,8..10:1", [4, 8, 9, 10]),
        ("adapter.lora_dropout", "0..0.3:0.1", [0.0, 0.1, 0.2, 0.3]),  # not 0.30000000000000004
        ("training.learning_rate", "1e-4..1e-2*5", [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]),
        ("training.learning_rate", "1e-4, 2E-4", [1e-4, 2e-4]),
        ("training.learning_rate", "1e-2..1e-4*2", [1e-2, 1e-4]),
        ("training.early_stopping_patience", "null,2", [None, 2]),
        ("adapter.use_dora", "true,false", [True, False]),
        ("adapter.target_modules", "q_proj+v_proj,all-linear", [["q_proj", "v_proj"], "all-linear"]),
        ("adapter.target_modules", "[[q_proj, v_proj], all-linear]", [["q_proj", "v_proj"], "all-linear"]),
        ("adapter.target_modules", ".*(q|v)_proj+,all-linear", [".*(q|v)_proj+", "all-linear"]),
        ("data.train", "a+b.jsonl,c.jsonl", ["a+b.jsonl", "c.jsonl"]),  # no list there
    ],
)
def test_a_grids_text(key: str, text: str, values: list[Any]) -> None:
    assert axis_values(key, text) == values
    assert [type(value) for value in axis_values(key, text)] == [type(value) for value in values]


def test_a_grid_in_yaml_takes_lists_single_values_and_text() -> None:
    assert axis_values("adapter.r", [2, 4]) == [2, 4]
    assert axis_values("adapter.r", 2) == [2]
    assert axis_values("training.learning_rate", ["1e-4", 1e-3]) == [1e-4, 1e-3]  # YAML reads 1e-4 as text
    assert axis_values("adapter.target_modules", [["q_proj"], "own"]) == [["q_proj"], "own"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("adapter.rr=2", "unknown key 'adapter.rr'; did you mean 'r'"),
        ("learning_rate=1e-4,1e-3", "it belongs at 'training.learning_rate'"),
        ("lora_r=2,4", "here it is adapter.r"),
        ("model.dtype=float32,bfloat16", "share one base"),
        ("quantization.load_in_4bit=true,false", "share one base"),
        ("evaluation.max_rows=3,4", "rows they are scored on"),
        ("output_dir=a,b", "the same for all members"),
        ("training.tokens_per_pass=256,512", "the same for all members"),
        ("adapter.r=1..4", "without a step"),
        ("adapter.r=4..1:1", "a <= b"),
        ("adapter.r=1..4:0", "step > 0"),
        ("adapter.r=0..4*3", "above 0"),
        ("adapter.r=1..4*1", "n from 2"),
        ("adapter.r=1..4*2.5", "n from 2"),
        ("adapter.r=1..9999999:1", "at most 1,000"),
        ("adapter.r=2,,4", "empty value"),
        ("adapter.r=", "expected KEY=VALUES"),
        ("adapter.r", "expected KEY=VALUES"),
        ("adapter.target_modules=[q_proj", "not a YAML list"),
        ("adapter.r=[]", "has no values"),
    ],
)
def test_a_grid_that_cannot_be_read(text: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        grid_axes(parse_grid([text]))
    assert told in str(caught.value)


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"adapter\.r=2,4"):
        parse_grid(["adapter.r=2", "adapter.r=4"])


def test_members_are_the_product_and_their_names_say_what_differs() -> None:
    made = trials({"adapter.r": [2, 4], "training.learning_rate": "1e-4..1e-3*2"}, seeds=2)
    assert [trial.name for trial in made][:3] == [
        "r-2_learning_rate-0.0001_seed-0",
        "r-2_learning_rate-0.0001_seed-1",
        "r-2_learning_rate-0.001_seed-0",
    ]
    assert len(made) == 8
    last = made[-1]
    assert (last.recipe.adapter.r, last.recipe.training.learning_rate, last.recipe.training.seed) == (4, 1e-3, 1)
    assert last.recipe.output_dir == str(OUT / "r-4_learning_rate-0.001_seed-1")
    assert last.point == "r-4_learning_rate-0.001"
    assert last.values == {"adapter.r": 4, "training.learning_rate": 1e-3}
    assert {trial.recipe.data.train for trial in made} == {"rows.jsonl"}


def test_seeds_in_a_grid_are_seeds() -> None:
    made = trials({"training.seed": [3, 5]})
    assert [(trial.name, trial.point, trial.recipe.training.seed) for trial in made] == [
        ("seed-3", "all", 3),
        ("seed-5", "all", 5),
    ]
    with pytest.raises(RequestError, match="varied twice"):
        trials({"training.seed": [3, 5]}, seeds=2)


def test_another_method_leaves_options_behind_that_say_nothing_to_it() -> None:
    made = trials({"adapter.method": ["lora", "ia3", "dora"]}, adapter={"r": 8, "lora_alpha": 8, "lora_dropout": 0.1})
    assert [trial.recipe.adapter.method for trial in made] == ["lora", "ia3", "lora"]
    assert made[2].recipe.adapter.use_dora
    assert made[2].recipe.adapter.r == made[0].recipe.adapter.r == 8
    with pytest.raises(RecipeError, match="nothing to method ia3"):
        trials({"adapter.method": ["lora", "ia3"], "adapter.r": [2, 4]})


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ({"adapter.r": [4, 4]}, "two members have the name 'r-4'"),
        ({"data.train": ["a/b", "a b", "a-b"]}, "two members have the name"),
        ({"adapter.r": [4]}, "two members or more"),
        ({}, "two members or more"),
        ({"adapter.r": [0, 4]}, "greater than or equal to 1"),
        ({"adapter.r": "1..500:1", "training.max_steps": "1..500:1"}, "250,000 members"),
    ],
)
def test_members_that_cannot_be(grid: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError) as caught:
        trials(grid)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("value", "name"),
    [(0.001, "0.001"), (1e-5, "1e-05"), (True, "true"), (None, "none"), (["q", "v"], "q+v"), ("../a b/c", "a-b-c")],
)
def test_names_are_safe_for_folders(value: Any, name: str) -> None:
    assert safe_name(value) == name


def test_long_values_keep_apart() -> None:
    one, other = safe_name("x" * 200), safe_name("x" * 201)
    assert one != other
    assert len(one) < 60


JOBS = [
    {"name": "anna", "data": {"train": "anna.jsonl"}, "adapter": {"r": 4}},
    {"name": "ben", "data": {"train": "ben.jsonl"}, "training": {"learning_rate": 1e-3}, "output_dir": "runs/bens"},
]


def test_jobs_lie_over_the_recipe() -> None:
    values = {"model": BASE["model"], "data": {"max_length": 64}, "adapter": {"r": 8, "lora_alpha": 8}, "jobs": JOBS}
    anna, ben = expand(make_sweep(values), [], OUT)
    assert (anna.recipe.data.train, anna.recipe.data.max_length, anna.recipe.adapter.r) == ("anna.jsonl", 64, 4)
    assert (ben.recipe.adapter.r, ben.recipe.adapter.lora_alpha, ben.recipe.training.learning_rate) == (8, 8, 1e-3)
    assert (anna.recipe.output_dir, ben.recipe.output_dir) == (str(OUT / "anna"), "runs/bens")


@pytest.mark.parametrize(
    ("jobs", "told"),
    [
        ([*JOBS, {"name": "anna", "data": {"train": "c"}}], "two members have the name 'anna'"),
        ([*JOBS, {"name": "c", "data": {"train": "c"}, "output_dir": "runs/../runs/bens"}], "have one output_dir"),
        ([{"name": "a/b", "data": {"train": "c"}}], "cannot be a folder's"),
        ([{"name": "before", "data": {"train": "c"}}], "calls something of its own"),
        ([{"name": "a", "data": {"trian": "c"}}], "job 'a'"),
        ([{"name": "a", "dat": {"train": "c"}}], "did you mean 'data'"),
        ([{"data": {"train": "c"}}], "'name' is needed"),
        ({"a": 1}, "expected a list"),
        (["a"], "jobs[0]"),
    ],
)
def test_jobs_that_cannot_be(jobs: Any, told: str) -> None:
    with pytest.raises(RequestError) as caught:
        expand(make_sweep({**BASE, "jobs": jobs}), [], OUT)
    assert told in str(caught.value)


def test_jobs_stand_beside_no_grid() -> None:
    with pytest.raises(RequestError, match="Give one of the two"):
        expand(make_sweep({**BASE, "jobs": JOBS, "sweep": {"grid": {"adapter.r": [2, 4]}}}), [], OUT)


def test_the_sweep_section_is_strict() -> None:
    sweep = make_sweep({**BASE, "sweep": {"halving": True, "preset": "learning-rate", "seeds": 3}}).sweep
    assert sweep.halving is not None
    assert (sweep.halving.factor, sweep.halving.rungs, sweep.seeds) == (3, 3, 3)
    assert make_sweep({**BASE, "sweep": {"halving": False}}).sweep.halving is None
    for section, told in (
        ({"gird": {}}, "did you mean 'grid'"),
        ({"halving": {"rung": 2}}, "did you mean 'rungs'"),
        ({"halving": {"factor": 1}}, "greater than or equal to 2"),
        ({"preset": "ranks"}, "'preset'"),
        ({"seeds": 0}, "'seeds'"),
        ([1], "sweep holds list"),
    ):
        with pytest.raises(RecipeError) as caught:
            make_sweep({**BASE, "sweep": section})
        assert told in str(caught.value)


@pytest.mark.parametrize("section", ["sweep: {grid: {adapter.r: [2, 4]}}", "jobs: [{name: a}]"])
def test_a_single_run_says_where_several_go(section: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{model_name_or_path: m}}\ndata: {{train: d}}\n{section}\n", "utf-8")
    with pytest.raises(RecipeError, match="use `topwork sweep"):
        load_recipe(path)
