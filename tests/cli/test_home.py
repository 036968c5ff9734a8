"""`~` on the command line where no shell has expanded it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from run.fixtures import Said


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_options_and_arguments_go_home(
    topwork: Callable[..., Said], home: Path, make_recipe: Callable[..., Path]
) -> None:
    recipe = make_recipe(output_dir="~/runs/x")
    recipe.rename(home / "my recipe.yaml")
    said = topwork("lint", "~/my recipe.yaml", "--html=~/page.html")
    assert said.code == 0, said.err
    assert (home / "page.html").is_file()
    assert str(home / "nothing") in topwork("report", "'~/nothing'").err
    assert str(home / "a") in topwork("combine", "~/a", f"file://{home}/b", "~/out").err
    assert not list(Path().iterdir()), "no folder called ~"


def test_the_run_goes_home(topwork: Callable[..., Said], home: Path, make_recipe: Callable[..., Path]) -> None:
    recipe = make_recipe(training={"max_steps": 1, "warmup_steps": 0})
    assert topwork("train", recipe, "--set", "output_dir=~/runs/x").code == 0
    assert (home / "runs" / "x" / "result.json").is_file()
    assert topwork("merge", "~/runs/x", "~/merged").code == 0
    assert (home / "merged" / "model.safetensors").is_file()
    assert topwork("export", "~/runs/x", "~/exported", "--format", "peft").code == 0
    assert list((home / "exported").rglob("adapter_config.json"))
    assert not list(Path().iterdir()), "no folder called ~"
