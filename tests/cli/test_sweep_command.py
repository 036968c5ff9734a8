"""`topwork sweep` as it is typed: its help, what it prints, and requests that are refused before a file is written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from run import tiny
from run.fixtures import Said

Recipes = Callable[..., Path]
Command = Callable[..., Said]
SHORT = {"max_steps": 2, "eval_steps": 1, "save_steps": 1, "batch_size": 2}


@pytest.fixture
def refused(topwork: Command, tmp_path: Path) -> Callable[..., str]:
    """refused(recipe, "--grid", …): the message, after the checks that hold for each."""

    def run(*arguments: object) -> str:
        before = tiny.folder_bytes(tmp_path)
        said = topwork("sweep", *arguments)
        assert said.code == 2, said
        assert tiny.folder_bytes(tmp_path) == before
        assert not (tmp_path / "run-sweep").exists()
        assert "Traceback" not in said.err
        return said.err.rpartition("error: ")[2]

    return run


def test_help_has_examples(topwork: Command) -> None:
    said = topwork("sweep", "--help")
    assert said.code == 0
    text = " ".join(said.out.split())
    assert "topwork sweep recipe.yaml --preset rank --seeds 3" in text
    assert "--grid adapter.r=4,8,16" in text


def test_it_prints_a_table_and_where_the_report_is(topwork: Command, make_recipe: Recipes, tmp_path: Path) -> None:
    said = topwork("sweep", make_recipe(training=SHORT), "--grid", "adapter.r=2,4")
    assert said.code == 0, said.err
    assert "r-2: step 2: validation loss" in said.out
    assert "exact answers" in said.out
    assert str(tmp_path / "run-sweep" / "sweep.html") in said.out
    again = topwork("sweep", make_recipe(training=SHORT), "--grid", "adapter.r=2,4", "--resume", "--json")
    assert [member["name"] for member in json.loads(again.out)["members"]] == ["r-2", "r-4"]
    assert "2 members in" in again.err
    other = topwork("sweep", make_recipe(training=SHORT), "--grid", "adapter.r=2,3", "--overwrite", "--json")
    assert [member["state"] for member in json.loads(other.out)["members"]] == ["finished", "finished"]
    assert not (tmp_path / "run-sweep" / "r-4").exists()


def test_a_dry_run_lists_members_and_writes_nothing(topwork: Command, make_recipe: Recipes, tmp_path: Path) -> None:
    recipe = make_recipe()
    said = topwork("sweep", recipe, "--preset", "targets", "--seeds", "2", "--dry-run", "--json")
    assert said.code == 0, said.err
    listed = json.loads(said.out)
    assert len(listed["members"]) == 4 * 2
    assert listed["output_dir"] == str(tmp_path / "run-targets")
    assert not (tmp_path / "run-targets").exists()


@pytest.mark.parametrize(
    ("preset", "told", "count"),
    [
        ("rank", "lora_alpha / r held at 2", 6),
        ("targets", "q,v at r 17 (3,808 parameters)", 4),
        ("scaling", "0.25, 1, 4, 16, 64, 256 at r 16", 6),
        ("learning-rate", "1e-05, 3.16e-05, 0.0001", 7),
        ("methods", "ia3", 10),
    ],
)
def test_a_preset_tells_what_it_shows(
    preset: str, told: str, count: int, topwork: Command, make_recipe: Recipes
) -> None:
    said = topwork("sweep", make_recipe(), "--preset", preset, "--dry-run")
    assert said.code == 0, said.err
    assert told in said.out
    assert "It shows" in said.out
    assert f"{count} members in" in said.out


def test_a_method_that_the_base_cannot_take_is_left_out_and_said(topwork: Command, make_recipe: Recipes) -> None:
    said = topwork(
        "sweep", make_recipe(), "--preset", "methods", "--dry-run", "--set", "quantization.load_in_4bit=true"
    )
    assert said.code == 0, said.err
    assert "left out: full: a quantized base" in said.out
    assert "9 members in" in said.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "two members or more"),
        (["--grid", "adapter.rr=2,4"], "did you mean 'r'"),
        (["--grid", "adapter.r=2,2"], "two members have the name 'r-2'"),
        (["--grid", "adapter.r=2..8"], "without a step"),
        (["--grid", "model.device=cpu,cuda"], "share one base"),
        (["--grid", "adapter.target_modules=q_proj,q_porj"], "did you mean 'q_proj'"),
        (["--grid", "adapter.method=lora,bitfit"], "bias"),
        (["--grid", "adapter.r=2,4", "--seeds", "0"], "--seeds is 0"),
        (["--preset", "ranks"], "there are rank, targets"),
        (["--grid", "adapter.r=2,4", "--set", "training.tokens_per_pass=30"], "the longest sequence has"),
        (["--grid", "adapter.r=2,4", "--set", "evaluation.data=nothing.jsonl"], "nothing.jsonl does not exist"),
        (["--grid", "data.train=nothing.jsonl,other.jsonl"], "nothing.jsonl does not exist"),
        (["--grid", "adapter.r=2,4", "--set", "data.eval_fraction=0"], "rows that none was trained on"),
        (["--grid", "adapter.r=2,4", "--set", "model.device=cuda:77"], "is not to be had here"),
        (["--grid", "adapter.r=2,4", "--set", "model.model_name_or_path=smollm-135m"], "did you mean 'smollm2-135m'"),
        (["--grid", "adapter.r=2,4", "--resume", "--overwrite"], "give one of the two"),
        (["--grid", "adapter.r=2,4", "--set", "sweep.gird={}"], "did you mean 'grid'"),
        (["--grid", "adapter.method=lora,ia3", "--set", "training.loraplus_lr_ratio=4"], "has no B matrices"),
    ],
)
def test_what_is_refused(arguments: list[str], told: str, refused: Callable[..., str], make_recipe: Recipes) -> None:
    assert told in refused(make_recipe(), *arguments)


def test_two_jobs_with_one_folder_or_one_name(
    refused: Callable[..., str], make_recipe: Recipes, tmp_path: Path
) -> None:
    same = str(tmp_path / "same")
    jobs = [{"name": name, "output_dir": same} for name in ("a", "b")]
    assert "have one output_dir" in refused(make_recipe(jobs=jobs))
    assert "two members have the name 'a'" in refused(make_recipe(jobs=[{"name": "a"}, {"name": "a"}]))
    pass_apart = [{"name": "a"}, {"name": "b", "training": {"tokens_per_pass": 200}}]
    assert "differ in training.tokens_per_pass" in refused(make_recipe(jobs=pass_apart))


def test_a_folder_with_other_files_is_left_alone(topwork: Command, make_recipe: Recipes, tmp_path: Path) -> None:
    (tmp_path / "run-sweep").mkdir()
    (tmp_path / "run-sweep" / "thesis.txt").write_text("years of work", "utf-8")
    for more in ([], ["--overwrite"], ["--resume"]):
        said = topwork("sweep", make_recipe(), "--grid", "adapter.r=2,4", *more)
        assert said.code == 2
        assert "holds other files" in said.err
    assert [path.name for path in (tmp_path / "run-sweep").iterdir()] == ["thesis.txt"]


def test_train_says_where_several_runs_go(topwork: Command, make_recipe: Recipes) -> None:
    recipe = make_recipe()
    recipe.write_text(recipe.read_text("utf-8") + "sweep: {grid: {adapter.r: [2, 4]}}\n", "utf-8")
    said = topwork("train", recipe)
    assert said.code == 2
    assert f"use `topwork sweep {recipe}`" in said.err
