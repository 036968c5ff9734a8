"""A sweep's folder: what is gone on with, what is deleted, and where it is when it was moved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import topwork.reporting.sweep as sweep_report
from run import tiny
from topwork.common.errors import RequestError
from topwork.run.ownership import RUN, is_run
from topwork.run.sweep.plan import SweepOptions
from topwork.run.sweep.run import Swept, sweep

Recipes = Callable[..., Path]
SHORT = {"max_steps": 2, "eval_steps": 2, "save_steps": 1, "batch_size": 2}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_report, "_charts", lambda _sweep, _records: [])


def quietly(recipe: Path, ranks: str, overrides: tuple[str, ...] = (), **options: Any) -> Swept:
    return sweep(recipe, overrides, SweepOptions((f"adapter.r={ranks}",)), log=lambda _: None, **options)


def test_resume_begins_no_sweep(make_recipe: Recipes, tmp_path: Path) -> None:
    recipe = make_recipe("suport", training=SHORT)
    with pytest.raises(RequestError, match=r"suport-sweep is not there|suport-sweep holds no sweep"):
        quietly(recipe, "2,4", resume=True)
    (tmp_path / "support-sweep").mkdir()
    (tmp_path / "support-sweep" / "sweep.json").write_text("{}")
    with pytest.raises(RequestError, match=r"nothing to go on with .*did you mean .*/support-sweep\?"):
        quietly(recipe, "2,4", resume=True)
    assert not (tmp_path / "suport-sweep").exists()
    with pytest.raises(RequestError, match="is a folder; give the recipe"):
        quietly(tmp_path / "support-sweep", "2,4", resume=True)


def test_overwriting_a_sweep_deletes_what_its_runs_wrote_and_nothing_else(make_recipe: Recipes, tmp_path: Path) -> None:
    recipe = make_recipe(training=SHORT)
    folder = quietly(recipe, "2,4").folder
    mine = ["r-2/notes.txt", "pictures/mine.png", "r-4/report/chapter.md"]
    for file in (*mine, "pictures/curves.png"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("mine")
    (folder / "r-2" / "adapter" / "mine.txt").write_text("mine")
    before = tiny.folder_bytes(folder)
    with pytest.raises(RequestError, match=r"adapter/mine\.txt.*Nothing was deleted"):
        quietly(recipe, "2,3", overwrite=True)
    assert tiny.folder_bytes(folder) == before
    (folder / "r-2" / "adapter" / "mine.txt").unlink()
    done = quietly(recipe, "2,3", overwrite=True)
    assert [trial.name for trial in done.state.trials] == ["r-2", "r-3"]
    assert all((folder / file).read_text() == "mine" for file in mine)
    assert not (folder / "pictures" / "curves.png").exists()
    assert sorted(tiny.folder_bytes(folder / "r-4")) == ["report/chapter.md", RUN]
    quietly(recipe, "3,5", overwrite=True)
    assert is_run(folder / "r-2")
    for file in ("r-2/notes.txt", f"r-2/{RUN}"):
        (folder / file).unlink()
    quietly(recipe, "7,8", overwrite=True)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["pictures", "r-2", "r-4", "r-7", "r-8"]
    assert not list(folder.rglob(".topwork-*"))


def test_a_sweep_whose_runs_have_no_lists_is_not_deleted(make_recipe: Recipes) -> None:
    recipe = make_recipe(training=SHORT)
    folder = quietly(recipe, "2,4").folder
    (folder / "r-4" / RUN).unlink()
    before = tiny.folder_bytes(folder)
    with pytest.raises(RequestError, match="earlier Topwork"):
        quietly(recipe, "2,4", overwrite=True)
    assert tiny.folder_bytes(folder) == before


def test_a_moved_sweep_goes_on_where_it_is(
    make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed between its two waves; the runs of the second were not begun."""
    import topwork.run.sweep.run as module

    recipe = make_recipe(training=SHORT)
    whole = quietly(make_recipe("whole", training=SHORT), "2,4").folder
    monkeypatch.setattr(module, "trials_that_fit", lambda *_: 1)
    monkeypatch.setattr(module, "_take_off", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quietly(recipe, "2,4")
    monkeypatch.undo()
    monkeypatch.setattr(sweep_report, "_charts", lambda _sweep, _records: [])
    (tmp_path / "run-sweep").rename(tmp_path / "moved-sweep")
    done = quietly(recipe, "2,4", (f"output_dir={tmp_path / 'moved'}",), resume=True)
    assert done.folder == tmp_path / "moved-sweep"
    assert not (tmp_path / "run-sweep").exists()
    for name in ("r-2", "r-4"):
        assert sorted(tiny.folder_bytes(done.folder / name / "adapter")) == sorted(
            tiny.folder_bytes(whole / name / "adapter")
        )
