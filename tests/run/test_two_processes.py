"""Two processes on one folder: one goes on, the other is told of it and touches nothing."""

import re
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from run import tiny
from run.processes import Commands
from run.two_processes import ONE, pair
from topwork.common.errors import RequestError
from topwork.common.locks import locked
from topwork.recipe.recipe import load_recipe
from topwork.run.sweep.run import SweepOptions, sweep
from topwork.run.train import train, train_together

Recipes = Callable[..., Path]
SHORT = {"max_steps": 2, "eval_steps": 2}


@pytest.mark.parametrize("kind", ["new", "overwrite and resume"])  # all kinds: benchmarks/pairs_on_one_folder.py
def test_of_two_that_start_at_once_one_goes_on(
    kind: str, commands: Commands, tiny_llama: Path, tickets: Path, tmp_path: Path
) -> None:
    found = pair(kind, commands, tiny_llama, tickets, tmp_path)
    assert found in ONE


def test_who_is_refused_touches_nothing_not_even_what_the_other_has_half_written(
    make_recipe: Recipes, trained: Path, tmp_path: Path
) -> None:
    """Whatever is asked for; and the holder is named."""
    recipe = make_recipe()
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for half in (run / ".topwork-new-adapter-0123abcd", run / "checkpoints" / ".topwork-new-step-000099-0123abcd"):
        half.mkdir()
        (half / "state.json").write_text("{")
    told: list[str] = []

    def asked(**options: bool) -> None:
        for ask in (
            lambda: train(recipe, log=lambda _: None, **options),
            lambda: train(run, log=lambda _: None, **options),
            lambda: train_together([load_recipe(recipe)], log=lambda _: None, **options),
        ):
            with pytest.raises(RequestError) as caught:
                ask()
            told.append(str(caught.value))

    with locked([run]):
        before = tiny.folder_bytes(run)
        for options in ({}, {"resume": True}, {"overwrite": True}):
            thread = threading.Thread(target=asked, kwargs=options)
            thread.start()
            thread.join()
            assert tiny.folder_bytes(run) == before
    assert len(told) == 9
    assert all(re.search(rf"process \d+ on {socket.gethostname()} since 20", each) for each in told), told


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("held", ["run-sweep", "run-sweep/r-4"])
def test_a_sweep_is_refused_where_it_or_one_of_its_runs_is_held(
    held: str, options: dict[str, bool], make_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(training=SHORT)
    (tmp_path / "run-sweep").mkdir()
    (tmp_path / "run-sweep" / ".topwork-new-sweep.json-0123abcd").write_text("half")
    with locked([tmp_path / held]):
        before = tiny.folder_bytes(tmp_path / "run-sweep")
        with pytest.raises(RequestError, match=f"{held} is in use by process"):
            sweep(recipe, (), SweepOptions(("adapter.r=2,4",)), log=lambda _: None, **options)
        assert tiny.folder_bytes(tmp_path / "run-sweep") == before
        assert not (tmp_path / "run-sweep" / "r-2").exists()
