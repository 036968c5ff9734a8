"""Every recipe that is shipped loads and trains, and the files it names are there."""

from pathlib import Path

import pytest

from topwork.common.hub import HUB_ID
from topwork.models.source import ALIASES
from topwork.recipe.recipe import load_recipe
from topwork.run.evaluate import evaluate
from topwork.run.sweep.plan import plan_sweep
from topwork.run.train import train

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SWEEPS = [EXAMPLES / "sweep.yaml"]
RECIPES = sorted(path for path in EXAMPLES.rglob("*.y*ml") if path not in SWEEPS)
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.yaml"))


def test_there_are_examples() -> None:
    assert EXAMPLES / "support" / "recipe.yaml" in RECIPES
    assert BENCHMARKS


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.name)
def test_a_benchmark_recipe_loads(path: Path) -> None:
    load_recipe(path)  # its rows are made by the benchmark


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_an_example_trains_and_is_scored(path: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """The shipped recipe as it is, but for a base that takes seconds."""
    changes = {
        "model.model_name_or_path": tiny_llama,
        "training.max_steps": 2,
        "data.max_rows": 40,
        "data.too_long": "truncate",  # its tokenizer has a token per byte
        "output_dir": tmp_path / "run",
    }
    run = train(path, [f"{key}={value}" for key, value in changes.items()], log=lambda _: None)
    assert run.result["steps"] == 2
    assert run.result["last_loss"] < run.result["first_loss"] * 1.5
    scores = evaluate(run.folder, max_rows=3, log=lambda _: None)
    assert scores["rows"] == 3
    assert {"before", "after"} <= scores.keys()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_an_example_of_several_runs_expands_and_its_files_exist(path: Path) -> None:
    plan = plan_sweep(path, check_data=False)
    assert len(plan.trials) == 6
    assert plan.out == Path("runs/support-sweep")
    for trial in plan.trials:
        assert Path(trial.recipe.data.train).is_file()
        assert Path(str(trial.recipe.evaluation.data)).is_file()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_an_example_loads_and_its_files_exist(path: Path) -> None:
    recipe = load_recipe(path)
    for name in (recipe.data.train, recipe.data.eval, recipe.evaluation.data):
        assert name is None or Path(name).is_file(), f"{path} names {name}"
    template = recipe.data.chat_template
    assert template in (None, "chatml", "plain") or Path(str(template)).is_file()
    model = recipe.model.model_name_or_path
    assert model in ALIASES or Path(model).exists() or HUB_ID.fullmatch(model)
    assert not Path(recipe.output_dir).is_absolute()
