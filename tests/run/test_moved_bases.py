"""A run whose base, rows or folder are no longer where they were, and one that may only be read."""

import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from run import tiny
from run.fixtures import Said
from topwork.common.errors import AdapterError, DataError, ModelError, RequestError, RunError
from topwork.reporting import page
from topwork.run import keeping
from topwork.run.chat import answer
from topwork.run.combine import combine
from topwork.run.evaluate import evaluate
from topwork.run.export import export
from topwork.run.merge import merge
from topwork.run.opened import open_run
from topwork.run.ownership import is_run, own, owned
from topwork.run.report import report

Topwork = Callable[..., Said]
ASKED = "Order 3: my lamp hums."


def silent(_: str) -> None:
    """Says nothing."""


def renamed(run: Path, old: object, new: object) -> Path:
    """The run's recipe with another path in it."""
    recipe = run / "recipe.yaml"
    assert str(old) in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(str(old), str(new)))
    return run


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "elsewhere" / "run")


@pytest.fixture
def moved(copied: Path, tiny_llama: Path) -> Path:
    """A run in another folder, whose base is named by a path that leads nowhere from here."""
    return renamed(copied, tiny_llama, "models/tiny-llama")


# The base


def test_a_base_that_is_gone_is_named_with_the_way_out(moved: Path, topwork: Topwork, tmp_path: Path) -> None:
    for words in (
        ("chat", moved, ASKED), ("eval", moved), ("merge", moved, tmp_path / "out"),
        ("export", moved, tmp_path / "out", "--format", "peft"), ("chat", "--compare", moved, ASKED),
        ("chat", "--compare", moved, "base", ASKED),
    ):  # fmt: skip
        said = topwork(*words)
        assert said.code == 2, words
        assert f"{moved} was trained on 'models/tiny-llama', which is not to be had here" in said.err, words
        assert "point to it with --model" in said.err
    assert not (tmp_path / "out").exists()


def test_a_moved_base_is_pointed_to(moved: Path, trained: Path, tiny_llama: Path, topwork: Topwork) -> None:
    base = str(tiny_llama)
    expected = answer(open_run(trained, log=silent), ASKED)
    assert answer(moved, ASKED, model=base) == expected
    said = topwork("chat", moved, ASKED, "--model", base)
    assert (said.code, said.out.strip()) == (0, expected.strip())
    said = topwork("chat", "--compare", moved, "base", ASKED, "--model", base, "--max-new-tokens", 2)
    assert said.code == 0, said.err
    found = evaluate(moved, max_rows=2, model=base, log=silent)
    before = evaluate(trained, max_rows=2, log=silent)
    assert {arm: found[arm]["loss"] for arm in ("before", "after")} == {
        arm: before[arm]["loss"] for arm in ("before", "after")
    }
    said = topwork("eval", moved, "--model", base, "--max-rows", 2, "--json")
    assert json.loads(said.out)["after"]["loss"] == found["after"]["loss"]


def test_a_moved_base_in_what_is_written(
    moved: Path, trained: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(tiny_llama)
    for run, name in ((moved, "merged"), (trained, "expected")):
        merge(run, tmp_path / name, check=0, model=base, log=silent)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected"))
    assert all(bool((found[key] == expected[key]).all()) for key in expected)
    monkeypatch.chdir(tiny_llama.parent.parent)  # a folder's relative name reads like an id on the Hub
    relative = f"{tiny_llama.parent.name}/{tiny_llama.name}"
    export(moved, tmp_path / "peft", "peft", check=0, model=relative, log=silent)
    record = combine([moved, trained], tmp_path / "combined", model=base, log=silent)
    assert len(record["sources"]) == 2


def test_another_base_is_no_moved_one(trained: Path, topwork: Topwork, tmp_path: Path) -> None:
    other = tiny.write_model(tmp_path / "other", seed_shift=0.01)
    for call in (
        lambda: answer(trained, ASKED, model=str(other)),
        lambda: evaluate(trained, max_rows=1, model=str(other), log=silent),
        lambda: merge(trained, tmp_path / "out", model=str(other), log=silent),
        lambda: export(trained, tmp_path / "out", "peft", model=str(other), log=silent),
    ):
        with pytest.raises(AdapterError, match="their weights differ"):
            call()
    assert not (tmp_path / "out").exists()
    said = topwork("chat", trained, ASKED, "--model", other, "--force", "--max-new-tokens", 1)
    assert (said.code, "loaded all the same" in said.err) == (0, True)
    with pytest.raises(ModelError, match=r"no model '/models/none'"):
        evaluate(trained, model="/models/none", log=silent)


# The rows


def test_a_merge_needs_no_rows(copied: Path, tickets: Path, tmp_path: Path) -> None:
    told: list[str] = []
    found = merge(renamed(copied, tickets, "gone/train.jsonl"), tmp_path / "out", check=5, log=told.append)
    assert found["inputs"] == "5 texts that Topwork brings, as the run's own rows cannot be read"
    assert any(line.startswith(f"compared on {found['inputs']} (gone/train.jsonl does not exist") for line in told)
    assert found["sequences"] == 5
    assert found["adapter_kl"] > 0


def test_held_out_rows_in_a_file_of_their_own_are_enough(copied: Path, tickets: Path, tmp_path: Path) -> None:
    held = tiny.write_rows(tmp_path / "held.jsonl", tiny.rows(6, 100))
    renamed(copied, tickets, "gone/train.jsonl")
    renamed(copied, "\n  eval: null", f"\n  eval: {held}")
    assert merge(copied, tmp_path / "out", log=silent)["inputs"] == "6 held-out and 0 training rows"
    assert evaluate(copied, max_rows=4, log=silent)["rows"] == 4


def test_an_evaluation_on_named_rows_needs_no_others(copied: Path, tickets: Path, topwork: Topwork) -> None:
    renamed(copied, tickets, "gone/train.jsonl")
    assert evaluate(copied, str(tickets), max_rows=2, log=silent)["rows"] == 2
    with pytest.raises(DataError, match=r"gone/train\.jsonl does not exist.*name rows to score by --data"):
        evaluate(copied, log=silent)
    assert topwork("chat", copied, ASKED, "--max-new-tokens", 1).code == 0


# A folder that may only be read


def no_touch(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """As the file system of another user's folder answers."""
    real_touch, real_open = Path.touch, keeping.write_json

    def touch(path: Path, *rest: Any, **options: Any) -> None:
        if folder in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        real_touch(path, *rest, **options)

    def write(path: Path, value: Any) -> None:
        if folder in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        real_open(path, value)

    patch.setattr(Path, "touch", touch)
    patch.setattr(keeping, "write_json", write)
    patch.setattr("topwork.run.ownership.write_json", write)


def test_a_run_that_may_only_be_read(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_touch(monkeypatch, copied)
    loaded: list[str] = []
    monkeypatch.setattr("topwork.run.opened.open_base", lambda *_: loaded.append("base"))
    with pytest.raises(RequestError, match=r"nothing can be written in .*\(Permission denied\); give a FILE .*--out"):
        evaluate(copied, log=silent)
    with pytest.raises(RequestError, match="give a FOLDER for it with --out"):
        report(copied)
    assert loaded == []
    monkeypatch.undo()
    no_touch(monkeypatch, copied)
    before = tiny.folder_bytes(copied)
    found = evaluate(copied, max_rows=2, out=tmp_path / "scores" / "run.json", log=silent)
    assert json.loads((tmp_path / "scores" / "run.json").read_text()) == found
    told: list[str] = []
    merge(copied, tmp_path / "merged", check=0, log=told.append)
    assert any("merge.json stands beside the merged model alone" in line for line in told)
    assert (tmp_path / "merged" / "merge.json").is_file()
    assert tiny.folder_bytes(copied) == before


def test_scores_that_cannot_be_written_in_the_end_are_not_lost(
    copied: Path, topwork: Topwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: Any) -> None:
        raise RunError(f"the disk is full: {path}")

    monkeypatch.setattr(keeping, "write_json", full)
    told: list[str] = []
    found = evaluate(copied, max_rows=2, log=told.append)
    assert "the disk is full" in found["not_written"]
    assert "the scores could not be written" in told[-2]
    assert json.loads(told[-1]) == {key: value for key, value in found.items() if key != "not_written"}
    said = topwork("eval", copied, "--max-rows", 2, "--json")
    assert (said.code, json.loads(said.out)["after"]["loss"]) == (1, found["after"]["loss"])


def test_scores_replace_nothing_but_scores(copied: Path, tickets: Path, tmp_path: Path) -> None:
    rows = shutil.copy(tickets, tmp_path / "rows.jsonl")
    for out, told in (
        (rows / "scores.json", "give another FILE"),
        (rows, "something else than scores"),
        (tmp_path, "is a folder"),
        (copied / "recipe.yaml", "else"),
    ):
        with pytest.raises(RequestError, match=told):
            evaluate(copied, rows, max_rows=1, out=out, log=silent)
    assert rows.read_bytes() == tickets.read_bytes()
    for _ in range(2):
        evaluate(copied, max_rows=1, out=tmp_path / "scores.json", log=silent)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="holds other files"):
        report(copied, out=tmp_path / "mine")


def test_what_is_written_into_a_run_is_the_runs(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(copied, "recipe.yaml")
    assert is_run(copied)
    evaluate(copied, max_rows=1, log=silent)
    evaluate(copied, checkpoint="last", before=True, log=silent)
    merge(copied, tmp_path / "merged", check=0, log=silent)
    known = {"evaluation-trial.json", "evaluation-step-000006.json", "merge.json"}
    assert known <= set(owned(copied))
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(page, "png_bytes", lambda _: b"")
    monkeypatch.setattr(page, "data_uri", lambda *_: "")
    for checkpoint, folder in ((None, "report"), (4, "report-step-000004")):
        report(copied, checkpoint=checkpoint)
        assert {f"{folder}/{path.name}" for path in (copied / folder).iterdir()} <= set(owned(copied))


@pytest.fixture
def others(trained: Path, tiny_llama: Path) -> Iterator[Path]:
    """A run and its base where every user may read them and no other may write."""
    if sys.platform == "win32" or os.geteuid() != 0:
        pytest.skip("only root can become another user")
    folder = Path(tempfile.mkdtemp())
    try:
        base = shutil.copytree(tiny_llama, folder / "base")
        renamed(shutil.copytree(trained, folder / "run"), tiny_llama, base)
        for place in (folder, *folder.rglob("*")):
            place.chmod(0o755 if place.is_dir() else 0o644)
        yield folder
    finally:
        shutil.rmtree(folder)


def as_nobody(call: Callable[[], None]) -> int:
    """A child of another user; the exit code."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setgid(65534)
            os.setuid(65534)
            call()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_another_users_run(others: Path, tickets: Path) -> None:
    run, mine = others / "run", others / "mine"
    rows = shutil.copy(tickets, others / "rows.jsonl")
    mine.mkdir()
    mine.chmod(stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO)

    def call() -> None:
        with pytest.raises(RequestError, match="give a FILE for them with --out"):
            evaluate(run, str(rows), max_rows=1, log=silent)
        evaluate(run, str(rows), max_rows=1, out=mine / "scores.json", log=silent)
        merge(run, mine / "merged", check=0, log=silent)
        answer(run, ASKED)

    before = tiny.folder_bytes(run)
    assert as_nobody(call) == 0
    assert (mine / "scores.json").is_file()
    assert (mine / "merged" / "merge.json").is_file()
    assert tiny.folder_bytes(run) == before
