"""A run's folder: what is a run, which one is meant, what may be deleted of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run import tiny
from run.fixtures import Said
from topwork.common.errors import RequestError
from topwork.recipe.recipe import load_recipe
from topwork.run.evaluate import evaluate
from topwork.run.ownership import RUN, is_run, own, owned
from topwork.run.train import train, train_together

Recipes = Callable[..., Path]
Command = Callable[..., Said]
SHORT = {"max_steps": 2, "eval_steps": 2, "save_steps": 1}
ANEW = ("training.max_steps=1",)


def quietly(given: Path, *overrides: str, **options: Any) -> Path:
    return train(given, overrides, log=options.pop("log", lambda _: None), **options).folder


@pytest.fixture
def refused(topwork: Command) -> Callable[..., str]:
    """refused(…): what is said by a command that is refused."""

    def ask(*arguments: object) -> str:
        said = topwork(*arguments)
        assert said.code == 2, said
        assert "Traceback" not in said.err
        return said.err

    return ask


def run_of(trained: Path, place: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(trained, place))


def unlisted(folder: Path) -> Path:
    """As an earlier Topwork left it."""
    (folder / RUN).unlink()
    return folder


# What is gone on with


@pytest.mark.parametrize("given", ["recipe", "folder", "recipe in folder"])
def test_resume_begins_nothing(given: str, refused: Callable[..., str], make_recipe: Recipes, trained: Path) -> None:
    recipe = make_recipe("suport")
    missing = recipe.with_suffix("")
    place = {"recipe": recipe, "folder": missing, "recipe in folder": missing / "recipe.yaml"}[given]
    assert "leave --resume out to begin" in (told := refused("train", place, "--resume"))
    assert "did you mean" not in told
    run_of(trained, recipe.parent / "support")
    run_of(trained, recipe.parent / "other")
    told = refused("train", place, "--resume")
    assert "suport is not there, so there is nothing to go on with" in told
    assert f"did you mean {recipe.parent}/support?" in told
    missing.mkdir()
    assert "suport holds no run" in refused("train", place, "--resume")
    assert list(missing.iterdir()) == []


def test_the_run_that_may_be_meant_is_one_that_is_there(
    trained: Path, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, empty = run_of(trained, tmp_path / "runs" / "support"), tmp_path / "runs" / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert f"did you mean {beside}?" in refused("train", ".", "--resume")
    run_of(trained, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert "did you mean runs/support?" in refused("train", "runs", "--resume")
    run_of(trained, tmp_path / "runs" / "other")
    assert "did you mean runs/other, or another in there?" in refused("train", "runs", "--resume")


def test_the_folder_that_is_given_is_gone_on_with_wherever_it_is(
    topwork: Command, make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Moved, and copied; by its folder, by its recipe, from within it; and by what an evaluation advises."""
    first = train_together([load_recipe(make_recipe(training=SHORT))], stop_at=1, log=lambda _: None)[0].folder
    shutil.rmtree(first / "adapter")
    moved = first.rename(tmp_path / "moved")
    copied = run_of(moved, tmp_path / "copied")
    inside = run_of(moved, tmp_path / "inside")
    advised = run_of(moved, tmp_path / "advised")
    shutil.rmtree(advised / "checkpoints")
    command = topwork("eval", advised).err.split("`")[1].removeprefix("topwork ").split()
    for arguments in (["train", moved, "--resume"], ["train", copied / "recipe.yaml", "--resume"], command):
        said = topwork(*arguments)
        assert said.code == 0, said
    monkeypatch.chdir(inside)
    assert topwork("train", "recipe.yaml", "--resume").code == 0
    for run in (moved, copied, inside, advised):
        assert json.loads((run / "result.json").read_text())["steps"] == 2
        assert tiny.folder_bytes(run / "adapter") == tiny.folder_bytes(moved / "adapter")
        assert load_recipe(run / "recipe.yaml").output_dir == str(run)
    assert not first.exists()


def test_a_run_that_is_given_is_not_begun_again_elsewhere(
    refused: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    moved = run_of(trained, tmp_path / "moved")
    before = tiny.folder_bytes(trained)
    for given in (moved, moved / "recipe.yaml"):
        assert "moved holds a run already" in refused("train", given)
    assert tiny.folder_bytes(trained) == before
    for elsewhere in (f"output_dir={tmp_path}/no", f"output_dir: {tmp_path}/no"):
        assert "there is nothing to go on with" in refused("train", moved, "--resume", "--set", elsewhere)
    (tmp_path / "plain").mkdir()
    assert "plain is a folder and holds no run" in refused("train", tmp_path / "plain")


def test_stopped_before_its_first_checkpoint_it_goes_on_from_step_0_and_says_so(
    make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import topwork.run.training

    recipe = make_recipe(training=SHORT)
    whole = quietly(make_recipe("whole", training=SHORT))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for where in ("write_text", "Loop"):  # before its recipe is written, and before its first step
        monkeypatch.setattr(topwork.run.training, where, killed)
        with pytest.raises(KeyboardInterrupt):
            quietly(recipe, resume=is_run(recipe.with_suffix("")))
        monkeypatch.undo()
        with pytest.raises(RequestError, match=r"holds a run already.*--resume"):
            quietly(recipe)
    said: list[str] = []
    run = quietly(recipe, resume=True, log=said.append)
    assert any("stopped before the first checkpoint; going on from step 0" in line for line in said)
    assert tiny.folder_bytes(run / "adapter") == tiny.folder_bytes(whole / "adapter")


def test_without_a_whole_checkpoint_it_is_refused_with_what_each_lacks(trained: Path, tmp_path: Path) -> None:
    run = run_of(trained, tmp_path / "run")
    broken = sorted((run / "checkpoints").iterdir())
    assert len(broken) >= 2
    (broken[0] / "state.json").unlink()
    for path in broken[1:]:
        (path / "optimizer.safetensors").write_bytes(b"")
    before = tiny.folder_bytes(run)
    with pytest.raises(RequestError, match="none is whole") as caught:
        quietly(run, resume=True)
    told = str(caught.value)
    assert all(path.name in told for path in broken)
    assert "state.json is missing" in told
    assert "optimizer.safetensors is truncated" in told
    assert "--overwrite" in told
    assert tiny.folder_bytes(run) == before
    quietly(run, *ANEW, overwrite=True)


def test_what_a_run_without_a_whole_checkpoint_is_told_to_do_can_be_done(trained: Path, tmp_path: Path) -> None:
    run = run_of(trained, tmp_path / "run")
    for path in (run / "checkpoints").iterdir():
        (path / "manifest.json").write_bytes(b"{")
    with pytest.raises(RequestError, match=r"--overwrite, once those whose manifest\.json is damaged are moved away"):
        quietly(run, resume=True)
    with pytest.raises(RequestError, match=r"nothing was deleted: move .* away"):
        quietly(run, overwrite=True)
    for path in (run / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    quietly(run, *ANEW, overwrite=True)


# What is a run


@pytest.mark.parametrize("output_dir", ["./", ".", "{here}", "{here}/../mine"])
@pytest.mark.parametrize("flag", [None, "--overwrite", "--resume"])
@pytest.mark.parametrize("name", ["recipe.yaml", "my.yaml"])
def test_a_recipes_own_folder_is_no_run(
    name: str, flag: str | None, output_dir: str, refused: Callable[..., str], make_recipe: Recipes,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """With reports and checkpoints of its owner beside it, and files that are called as ours."""
    mine = tmp_path / "mine"
    for file in ("report/chapter.md", "checkpoints/step-000002/weights.bin", "adapter/notes.txt", "provenance.json"):
        (mine / file).parent.mkdir(parents=True, exist_ok=True)
        (mine / file).write_text('{"who": "my own"}')
    (mine / RUN).write_text('{"files": ["adapter/notes.txt"]}')
    recipe = shutil.copy(make_recipe(), mine / name)
    monkeypatch.chdir(mine)
    before = tiny.folder_bytes(mine)
    place = output_dir.format(here=mine)
    told = refused("train", recipe, "--set", f"output_dir={place}", *([flag] if flag else []))
    assert "is the folder of the recipe" in told
    assert "runs/NAME" in told
    assert tiny.folder_bytes(mine) == before


def test_a_link_to_a_recipe_is_not_written_over(
    refused: Callable[..., str], make_recipe: Recipes, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").symlink_to(make_recipe())
    told = refused("train", tmp_path / "mine" / "recipe.yaml", "--set", f"output_dir={tmp_path / 'mine'}")
    assert "is the folder of the recipe" in told


def test_a_run_of_an_earlier_topwork_goes_on_and_is_not_deleted(
    topwork: Command, refused: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    run = unlisted(run_of(trained, tmp_path / "run"))
    assert is_run(run)
    before = tiny.folder_bytes(run)
    told = refused("train", run, "--overwrite")
    assert "earlier Topwork" in told
    assert all(way in told for way in ("Move the folder away", "--resume"))
    assert tiny.folder_bytes(run) == before
    evaluate(run, max_rows=1, log=lambda _: None)
    assert owned(run) == [], "an evaluation alone would make a list that lacks the rest"
    assert topwork("train", run, "--resume").code == 0
    assert {"evaluation-trial.json", "adapter", "checkpoints/step-000006"} <= set(owned(run))
    quietly(run, *ANEW, overwrite=True)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    assert not (run / "evaluation-trial.json").exists()


@pytest.mark.parametrize(
    "content", ["{", '{"files": ["adapter"]}', '["x"]', '{"format": 1, "topwork": "1", "files": ["../x"]}']
)
def test_a_list_that_is_not_ours_names_nothing(
    content: str, refused: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    run = run_of(trained, tmp_path / "run")
    (tmp_path / "x").write_text("mine")
    (run / RUN).write_text(content)
    before = tiny.folder_bytes(tmp_path)
    assert "no list of its files" in refused("train", run, "--overwrite")
    assert "Move it away" in refused("train", run, "--resume")
    assert tiny.folder_bytes(tmp_path) == before
    (run / "provenance.json").unlink()
    assert not is_run(run)


# What is deleted


def test_overwriting_deletes_what_the_run_wrote_and_nothing_else(
    topwork: Command, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import topwork.reporting.page as page

    for slow, content in (("png_bytes", b"a picture"), ("render", "a page")):
        monkeypatch.setattr(page, slow, lambda *_, content=content, **__: content)
    run = run_of(trained, tmp_path / "run")
    evaluate(run, max_rows=1, log=lambda _: None)
    assert topwork("report", run).code == 0
    assert topwork("merge", run, tmp_path / "merged", "--check", "2").code == 0
    written = set(tiny.folder_bytes(run))
    assert {"report/index.html", "report/curves.png", "merge.json", "evaluation-trial.json"} <= written
    mine = [
        "notes.txt", "report/chapter.md", "checkpoints/best.txt", "checkpoints/old/step-000001/weights.bin",
        "predictions.jsonl", "tensorboard/other/events.out.tfevents.1", "my adapter/adapter_config.json",
    ]  # fmt: skip
    for file in mine:
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_text("mine")
    quietly(run, *ANEW, overwrite=True)
    left = set(tiny.folder_bytes(run))
    assert all((run / file).read_text() == "mine" for file in mine)
    new = {name for name in left if name.startswith(("adapter/", "checkpoints/step-000001/"))}
    assert left - set(mine) == new | {"recipe.yaml", "run.json", "metrics.jsonl", "provenance.json", "result.json"} | (
        {"chat_template.jinja"} & written
    )
    quietly(run, *ANEW, overwrite=True)
    assert all((run / file).read_text() == "mine" for file in mine)


@pytest.mark.parametrize(
    "file",
    ["checkpoints/step-000099/state.json", "adapter/notes.txt", "checkpoints/step-000006/adapter/x", "evaluation.json",
     "tensorboard/events.out.tfevents.1"],
)  # fmt: skip
def test_what_the_next_run_would_take_for_its_own_is_refused_before_anything_is_deleted(
    file: str, refused: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    run = run_of(trained, tmp_path / "run")
    (run / file).parent.mkdir(parents=True, exist_ok=True)
    (run / file).write_text("mine")
    before = tiny.folder_bytes(run)
    told = refused("train", run, "--overwrite")
    assert file.removesuffix("/state.json") in told
    assert "Nothing was deleted" in told
    if "step-000099" in file:
        assert "Nothing was deleted" in refused("train", run, "--resume")
    assert tiny.folder_bytes(run) == before


def test_an_adapter_that_the_run_has_not_written_is_not_deleted(
    refused: Callable[..., str], trained: Path, tmp_path: Path
) -> None:
    run = run_of(trained, tmp_path / "run")
    for lost in ("adapter/manifest.json", "checkpoints/step-000006/manifest.json"):
        kept = (run / lost).read_bytes()
        (run / lost).unlink()
        before = tiny.folder_bytes(run)
        assert "cannot be told, so nothing was deleted" in refused("train", run, "--overwrite")
        assert tiny.folder_bytes(run) == before
        (run / lost).write_bytes(kept)


def test_a_list_says_what_is_written_before_it_is(trained: Path, tmp_path: Path) -> None:
    assert {"recipe.yaml", "provenance.json", "metrics.jsonl", "adapter", "result.json"} <= set(owned(trained))
    written = [f"checkpoints/{path.name}" for path in (trained / "checkpoints").iterdir()]
    assert set(written) <= set(owned(trained))
    own(tmp_path, "report")
    assert list(tmp_path.iterdir()) == [], "a folder that is no run gets no list"
