"""A run that is killed, stopped or fails goes on as if nothing had happened: the same bytes in the end."""

import random
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from run import tiny
from run.processes import Commands, reached, signal_at
from topwork.run.ownership import is_run

STEPS = 24


@pytest.fixture(scope="module")
def unbroken(commands: Commands, tiny_llama: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    recipe = tiny.write_recipe(folder / "recipe.yaml", tiny.recipe_values(tiny_llama, tickets, folder / "run"))
    code, said = commands.run(["train", str(recipe)])
    assert code == 0, said
    return folder / "run"


def test_killed_at_five_random_moments_and_resumed_ends_with_the_same_bytes(
    commands: Commands, make_recipe: Callable[..., Path], unbroken: Path, tmp_path: Path
) -> None:
    recipe, run = make_recipe(), tmp_path / "run"
    draw = random.Random()
    moments = [(step, draw.uniform(0.0, 0.02)) for step in sorted(draw.sample(range(STEPS - 2), 5))]
    continued = 0
    for step, delay in moments:
        how = ["--resume"] if is_run(run) else []
        code, said = commands.run(["train", str(recipe), *how], signal_at(run, step, signal.SIGKILL, delay))
        assert code == -signal.SIGKILL, (moments, said)
        continued += "going on from" in said
    code, said = commands.run(["train", str(recipe), "--resume"])
    assert code == 0, (moments, said)
    assert continued + ("going on from" in said) >= 3, f"the kills at {moments} hardly hit a run with a checkpoint"
    assert tiny.folder_bytes(run / "adapter") == tiny.folder_bytes(unbroken / "adapter"), moments
    last = f"checkpoints/step-{STEPS:06d}"  # optimizer, random state and what validations found, too
    assert tiny.folder_bytes(run / last) == tiny.folder_bytes(unbroken / last), moments


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_keeps_a_checkpoint_and_says_how_to_go_on(
    number: signal.Signals, commands: Commands, make_recipe: Callable[..., Path], unbroken: Path, tmp_path: Path
) -> None:
    recipe, run = make_recipe(training={"max_steps": 5, "save_steps": 100}), tmp_path / "run"
    changed = ["--set", f"training.max_steps={STEPS}", "--set", 'data.columns={"messages": "messages"}']
    code, said = commands.run(["train", str(recipe), *changed], signal_at(run, 7, number))
    assert code == 1, said
    stopped_at = reached(run)
    assert 7 <= stopped_at < STEPS
    assert f"interrupted after step {stopped_at}" in said
    assert (run / "checkpoints" / f"step-{stopped_at:06d}").is_dir()
    assert not (run / "adapter").exists()

    told = said.splitlines()[-1].strip()
    assert told.startswith("topwork train ")
    assert told.endswith("--resume")
    code, said = commands.run(shlex.split(told)[1:])
    assert code == 0, said
    assert f"step-{stopped_at:06d}" in said
    assert tiny.folder_bytes(run / "adapter") == tiny.folder_bytes(unbroken / "adapter")


def test_a_torn_newest_checkpoint_is_passed_over(commands: Commands, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)  # its recipe says the old place
    before = tiny.folder_bytes(unbroken)
    shutil.rmtree(run / "adapter")
    newest = run / "checkpoints" / f"step-{STEPS:06d}" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    code, said = commands.run(["train", str(run / "recipe.yaml"), "--resume"])  # a run's own recipe does as well
    assert code == 0, said
    assert f"step-{STEPS:06d} is passed over" in said
    assert f"going on from {run / 'checkpoints' / f'step-{STEPS - 2:06d}'}" in said
    assert tiny.folder_bytes(run / "adapter") == tiny.folder_bytes(unbroken / "adapter")
    assert tiny.folder_bytes(unbroken) == before
