"""Runs that have not finished, and checkpoints by name: what asks a run takes them as it takes a finished one."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from run import tiny
from run.fixtures import Said
from topwork.adapters.peft_format import read_adapter
from topwork.common.errors import CheckpointError, RequestError
from topwork.generation.sampling import Sampling
from topwork.recipe.recipe import load_recipe
from topwork.reporting import page as page_part
from topwork.run import chosen
from topwork.run.chat import answer
from topwork.run.compare import open_pair
from topwork.run.evaluate import evaluate
from topwork.run.export import export
from topwork.run.given import given_adapter
from topwork.run.merge import merge
from topwork.run.opened import open_run
from topwork.run.report import report
from topwork.run.train import train_together
from topwork.training.progress import Silent

Topwork = Callable[..., Said]
SYSTEM = "Answer in JSON."
STEPS, STOPPED = 8, 5


def silent(_: str) -> None:
    """Says nothing."""


def make(folder: Path, base: Path, **changes: Any) -> Path:
    """A recipe of eight steps with checkpoints every other step, and a system message in its rows."""
    folder.mkdir(exist_ok=True)
    rows = tiny.rows(24)
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": SYSTEM})
    train = tiny.write_rows(folder / "train.jsonl", rows)
    training = {"learning_rate": 0.02, "max_steps": STEPS, "save_steps": 2, "eval_steps": 2, "save_total_limit": 9}
    values = tiny.recipe_values(base, train, folder / "run", training=training | changes)
    return tiny.write_recipe(folder / "recipe.yaml", values)


class StopAt(Silent):
    """Asks the run to stop, as a scheduler does, when a step is done."""

    def stepped(self, step: int, record: dict[str, Any]) -> None:
        if step == STOPPED:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def stopped(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was asked to stop after its fifth step."""
    recipe = load_recipe(make(tmp_path_factory.mktemp("stopped"), tiny_llama))
    with suppress(KeyboardInterrupt):
        train_together([recipe], progress=lambda _: StopAt(), log=silent)
    folder = Path(recipe.output_dir)
    result = json.loads((folder / "result.json").read_text())
    assert (result["stopped"], result["steps"]) == ("interrupted", STOPPED)
    assert not (folder / "adapter").exists()
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.fixture
def killed(run: Path) -> Path:
    """The same as a kill leaves it: without a result."""
    (run / "result.json").unlink()
    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def step_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


# Which adapter it is


def test_a_stopped_run_gives_its_newest_checkpoint_and_says_so(run: Path) -> None:
    told: list[str] = []
    given = given_adapter(run, log=told.append)
    assert told == [f"{run} was stopped after step {STOPPED} of {STEPS}; this is its checkpoint of step {STOPPED}"]
    assert (given.checkpoint, given.place) == (STOPPED, run)
    assert same(dict(given.saved.tensors), dict(read_adapter(step_of(run, STOPPED) / "adapter").tensors))


def test_a_killed_run_gives_its_newest_whole_checkpoint(killed: Path) -> None:
    torn = step_of(killed, STOPPED) / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    before = tiny.folder_bytes(killed)
    told: list[str] = []
    assert given_adapter(killed, log=told.append).checkpoint == 4
    assert told[0].startswith(f"checkpoint step-{STOPPED:06d} is passed over for the one before")
    assert told[1].startswith(f"{killed} has not finished")
    assert told[1].endswith(f"its checkpoint of step 4 of {STEPS}")
    assert tiny.folder_bytes(killed) == before
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is truncated"):
        given_adapter(killed, checkpoint=STOPPED, log=silent)


def test_the_planned_steps_are_told_where_the_recipe_names_epochs(killed: Path) -> None:
    recipe = killed / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_steps: 8", "max_steps: null"))
    rows = json.loads((killed / "provenance.json").read_text())["data"]["train"]["rows"]
    told: list[str] = []
    given_adapter(killed, log=told.append)
    assert told[0].endswith(f"its checkpoint of step {STOPPED} of {-(-rows // 4)}")


@pytest.mark.parametrize("named", [4, "4", "step-000004"])
def test_a_checkpoint_by_its_step(run: Path, named: str | int) -> None:
    told: list[str] = []
    given = given_adapter(run, checkpoint=named, log=told.append)
    assert (given.checkpoint, told) == (4, [])
    assert same(dict(given.saved.tensors), dict(read_adapter(step_of(run, 4) / "adapter").tensors))


def test_the_best_checkpoint_is_the_best_validations(run: Path) -> None:
    state = json.loads((step_of(run, STOPPED) / "state.json").read_text())["state"]
    losses = {each["step"]: each["eval_loss"] for each in state["history"] if each["step"]}
    best = min(losses, key=losses.__getitem__)
    assert given_adapter(run, checkpoint="best", log=silent).checkpoint == best
    assert given_adapter(run, checkpoint="last", log=silent).checkpoint == STOPPED
    shutil.rmtree(step_of(run, best))
    with pytest.raises(RequestError, match=rf"was at step {best}, whose checkpoint is not kept; there are "):
        given_adapter(run, checkpoint="best", log=silent)


@pytest.mark.parametrize(
    ("named", "told"),
    [
        (3, "no checkpoint of that step; there are 2, 4, 5"),
        ("newest", "expected the step"),
        ("-2", "expected the step"),
    ],
)
def test_an_unknown_checkpoint_lists_those_that_are_there(run: Path, named: str | int, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        given_adapter(run, checkpoint=named, log=silent)


def test_a_checkpoints_folder_is_the_runs_checkpoint(run: Path) -> None:
    """Alone it would be asked by the base's template, on a base that is held otherwise than in training."""
    for place in (step_of(run, 2), step_of(run, 2) / "adapter"):
        given = given_adapter(place, log=silent)
        assert (given.place, given.checkpoint, given.template) == (run, 2, (run / "chat_template.jinja").read_text())
    with pytest.raises(RequestError, match="is a checkpoint already"):
        given_adapter(step_of(run, 2), checkpoint="best", log=silent)


def test_a_finished_run_gives_its_adapter_and_any_checkpoint(trained: Path) -> None:
    told: list[str] = []
    finished = given_adapter(trained, log=told.append)
    assert (finished.checkpoint, finished.folder, told) == (None, trained / "adapter", [])
    assert given_adapter(trained, checkpoint="last", log=silent).checkpoint == 6
    with pytest.raises(RequestError, match="only runs have them"):
        given_adapter(shutil.copytree(trained / "adapter", trained.parent / "alone"), checkpoint=2)


def test_without_a_checkpoint_it_says_how_to_go_on(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    for checkpoint in (None, "best", "last"):
        with pytest.raises(RequestError, match=r"no finished adapter and no checkpoint yet; go on with .*--resume"):
            given_adapter(run, checkpoint=checkpoint, log=silent)
    with pytest.raises(RequestError, match="there is none"):
        given_adapter(run, checkpoint=2, log=silent)


def test_a_diverged_run_is_asked_by_its_checkpoints_alone(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"stopped": "diverged"}))
    with pytest.raises(RequestError, match=rf"diverged after step {STOPPED} .*--checkpoint: there are 2, 4, 5"):
        given_adapter(run, log=silent)
    assert given_adapter(run, checkpoint="last", log=silent).checkpoint == STOPPED


def test_checkpoints_that_go_while_they_are_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that trains on deletes the oldest and writes newer ones."""
    reading = chosen.read_adapter

    def pruned(folder: Path) -> Any:
        if not step_of(run, 7).exists():
            shutil.copytree(step_of(run, STOPPED), step_of(run, 7))
            for step in (2, 4, STOPPED):
                shutil.rmtree(step_of(run, step))
        return reading(folder)

    monkeypatch.setattr(chosen, "read_adapter", pruned)
    told: list[str] = []
    assert given_adapter(run, log=told.append).folder == step_of(run, 7) / "adapter"
    assert not any("passed over" in line for line in told)
    with pytest.raises(RequestError, match="no checkpoint of that step; there is 7"):
        given_adapter(run, checkpoint=4, log=silent)


# The verbs


def test_chat_asks_a_killed_run_as_it_was_trained(killed: Path, topwork: Topwork, tiny_llama: Path) -> None:
    opened = open_run(killed, log=silent)
    assert (opened.checkpoint, opened.system) == (STOPPED, SYSTEM)
    assert opened.template.jinja == (killed / "chat_template.jinja").read_text()
    expected = answer(opened, "Order 3: my lamp hums.")
    said = topwork("chat", killed, "Order 3: my lamp hums.")
    assert (said.code, said.out.strip()) == (0, expected.strip())
    assert f"its checkpoint of step {STOPPED} of {STEPS}" in said.err
    (killed / "result.json").write_text("{")
    said = topwork("chat", killed, "Order 3: my lamp hums.")
    assert (said.code, said.out.strip()) == (0, expected.strip())
    assert "result.json is not whole JSON" in said.err
    recipe = killed / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("train.jsonl", "gone.jsonl"))
    said = topwork("chat", killed, "Order 3: my lamp hums.", "--checkpoint", "2")
    assert (said.code, "shared a system message cannot be told" in said.err) == (0, True)


def test_chat_compares_a_checkpoint_with_another(run: Path, topwork: Topwork) -> None:
    pair = open_pair((str(step_of(run, 2)), str(run)), log=silent)
    assert [side.system for side in pair.sides] == [SYSTEM, SYSTEM]
    asked, few = "Order 3: my lamp hums.", Sampling(6)
    pair.sampling = few
    expected = [answer(run, asked, sampling=few, checkpoint=step) for step in (2, None)]
    assert pair.say(asked) == expected
    said = topwork("chat", "--compare", run, "Order 3: my lamp hums.", "--checkpoint", 2, "--max-new-tokens", 3)
    assert said.code == 0, said.err
    said = topwork("chat", "--compare", run, step_of(run, 2), "--checkpoint", 2)
    assert (said.code, "of which of the two" in said.err) == (2, True)


def test_eval_of_a_checkpoint_leaves_the_finished_scores_alone(run: Path, topwork: Topwork) -> None:
    (run / "evaluation.json").write_text('{"rows": 1}')
    found = evaluate(run, checkpoint=4, log=silent)
    assert found["checkpoint"] == 4
    assert json.loads((run / "evaluation-step-000004.json").read_text()) == found
    said = topwork("eval", run, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["checkpoint"] == STOPPED
    assert "was stopped after step" in said.err
    assert (run / f"evaluation-step-{STOPPED:06d}.json").is_file()
    assert (run / "evaluation.json").read_text() == '{"rows": 1}'
    assert evaluate(run, checkpoint=4, max_rows=2, log=silent)["checkpoint"] == 4
    assert json.loads((run / "evaluation-trial.json").read_text())["checkpoint"] == 4


def test_merge_and_export_name_the_checkpoint(run: Path, topwork: Topwork, tmp_path: Path) -> None:
    evaluate(run, checkpoint=4, log=silent)
    (run / "evaluation.json").write_text('{"rows": 1, "after": {"exact_match": 0.5}}')
    said = topwork("merge", run, tmp_path / "merged", "--checkpoint", 4, "--check", 3)
    assert said.code == 0, said.err
    for folder in (tmp_path / "merged", run):
        assert json.loads((folder / "merge.json").read_text())["checkpoint"] == 4
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| checkpoint | 4 |" in card
    assert f"| Steps | 4 of {STEPS}" in card
    assert "50.0 %" not in card
    merge(run, tmp_path / "newest", check=0, log=silent)
    assert not same(_model(tmp_path / "merged"), _model(tmp_path / "newest"))
    done = export(run, tmp_path / "peft", "peft", check=0, log=silent, checkpoint=4)
    assert done.checkpoint == json.loads((tmp_path / "peft" / "export.json").read_text())["checkpoint"] == 4
    assert same(weights(tmp_path / "peft"), weights(step_of(run, 4) / "adapter"))
    with pytest.raises(RequestError, match="is no run"):
        export(tmp_path / "merged", tmp_path / "again", "hf", checkpoint="best", log=silent)


def _model(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_report_of_a_run_that_has_not_finished(
    run: Path, topwork: Topwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(page_part, "png_bytes", lambda _: b"")  # drawing is what takes its time
    monkeypatch.setattr(page_part, "data_uri", lambda *_: "")
    page = report(run).html.read_text()
    assert f"stopped after step {STOPPED} of {STEPS}" in page
    assert "Exact match" not in page
    evaluate(run, checkpoint=4, log=silent)
    assert "those of the checkpoint of step 4" in report(run).html.read_text()
    (run / "result.json").unlink()
    assert "has not finished" in report(run).html.read_text()
    said = topwork("report", run, "--checkpoint", 4, "--out", tmp_path / "page", "--model", "anywhere")
    assert said.code == 0, said.err
    page = (tmp_path / "page" / "index.html").read_text()
    assert "checkpoint of step 4" in page
    assert "Curves over 4 steps" in page
    assert report(step_of(run, 2)).html == run / "report-step-000002" / "index.html"
