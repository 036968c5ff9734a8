"""What tests of whole runs share; a conftest imports what its tests need."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from run import tiny
from run.processes import Commands
from topwork.run.train import train


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base with a tokenizer and SmolLM2's chat template."""
    return tiny.write_model(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture(scope="session")
def tickets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows."""
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", tiny.rows(40))


@pytest.fixture(scope="session")
def trained(tiny_llama: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps, with a rate at which the adapter is seen."""
    folder = tmp_path_factory.mktemp("trained")
    training = {"learning_rate": 0.02, "max_steps": 6, "eval_steps": 3}
    values = tiny.recipe_values(tiny_llama, tickets, folder / "run", training=training)
    return train(tiny.write_recipe(folder / "recipe.yaml", values), log=lambda _: None).folder


@pytest.fixture
def make_recipe(tiny_llama: Path, tickets: Path, tmp_path: Path) -> Callable[..., Path]:
    """make_recipe(name="run", **changes): a recipe file; its run is `name` in the test's folder."""

    def make(name: str = "run", **changes: Any) -> Path:
        values = tiny.recipe_values(tiny_llama, tickets, tmp_path / name, **changes)
        return tiny.write_recipe(tmp_path / f"{name}.yaml", values)

    return make


@pytest.fixture
def topwork(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """topwork("train", path, …): the command line, in this process."""
    from topwork.cli.app import main

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("GOMP_SPINCOUNT", "300000")
    for name in ("TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "false" if name.startswith("TOKEN") else "error")

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["topwork", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr()
        return Said(int(caught.value.code or 0), said.out, said.err)

    return run


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Commands in processes of their own."""
    started = Commands(tmp_path_factory.mktemp("logs"))
    yield started
    started.close()
