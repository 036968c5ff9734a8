"""Whole runs in this process: what they write, what they are told, and what stops them."""

import errno
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from run import tiny
from run.tiny import folder_bytes
from topwork.common.errors import NonFiniteLossError, RequestError, RunError
from topwork.objectives.objective import Loss
from topwork.objectives.sft import Sft
from topwork.plan.base import structure_named
from topwork.plan.setup import setup_of
from topwork.recipe.recipe import make_recipe as recipe_of
from topwork.run.outcome import TrainedRun
from topwork.run.ownership import own
from topwork.run.report import report
from topwork.run.train import train
from topwork.training.passes import Memory, plan_passes
from topwork.training.progress import Silent
from topwork.training.step import Means

Recipes = Callable[..., Path]
LONG = {"learning_rate": 0.01, "max_steps": 40, "lr_scheduler_type": "constant"}


def quietly(recipe: Path, overrides: tuple[str, ...] = (), **options: Any) -> TrainedRun:
    return train(recipe, overrides, log=lambda _: None, **options)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


class Heard(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finished(self) -> None:
        self.done += 1


def test_two_runs_of_one_recipe_write_the_same_adapter(make_recipe: Recipes, tmp_path: Path) -> None:
    first = quietly(make_recipe("first")).folder / "adapter"
    torch.manual_seed(12345)
    second = quietly(make_recipe("second")).folder / "adapter"
    assert folder_bytes(first) == folder_bytes(second)
    other = quietly(make_recipe("other", training={"seed": 1})).folder / "adapter"
    assert folder_bytes(first) != folder_bytes(other)


def test_training_learns_and_the_folder_says_so(make_recipe: Recipes) -> None:
    run = quietly(make_recipe(adapter={"lora_dropout": 0.0}, training=LONG))
    assert run.result["eval_loss_after"] < run.result["eval_loss_before"] - 0.2
    assert run.result["stopped"] == "finished"
    assert run.result["steps"] == run.result["planned_steps"] == 40
    assert run.result["tokens"] == sum(record["tokens"] for record in records(run.folder, "train"))
    assert json.loads((run.folder / "result.json").read_text("utf-8")) == json.loads(json.dumps(run.result))
    provenance = json.loads((run.folder / "provenance.json").read_text("utf-8"))
    assert provenance["base"]["fingerprint"].startswith("sha256:")
    assert provenance["seed"] == 0
    assert not list(run.folder.rglob(".topwork-*"))


def test_figures_do_not_depend_on_how_often_metrics_are_written(make_recipe: Recipes) -> None:
    each = quietly(make_recipe("each", training={"max_steps": 11})).result
    some = quietly(make_recipe("some", training={"max_steps": 11, "logging_steps": 4})).result
    assert (some["tokens"], some["learned_tokens"]) == (each["tokens"], each["learned_tokens"])


def test_the_losses_do_not_depend_on_tokens_per_pass(make_recipe: Recipes) -> None:
    losses = []
    for budget in (200, 350, 100_000):
        recipe = make_recipe(f"pass{budget}", adapter={"lora_dropout": 0.2}, training={"tokens_per_pass": budget})
        run = quietly(recipe).folder
        losses.append([record["loss"] for record in records(run, "train")])
        tokens = [record["tokens"] for record in records(run, "train")]
        assert tokens == [record["tokens"] for record in records(run.parent / "pass200", "train")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_one_batch_is_its_accumulated_parts(make_recipe: Recipes) -> None:
    whole = quietly(make_recipe("whole")).folder
    parts = make_recipe("parts")
    text = parts.read_text("utf-8").replace(
        "batch_size: 4", "per_device_train_batch_size: 2\n  gradient_accumulation_steps: 2"
    )
    parts.write_text(text, "utf-8")
    assert folder_bytes(quietly(parts).folder / "adapter") == folder_bytes(whole / "adapter")


def test_a_message_of_weight_zero_teaches_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    """Two answers each; the first counts not, and so the run is the one in which only the last is learned."""
    made = tiny.rows(24)
    for row in made:
        row["messages"] = [*row["messages"], {"role": "user", "content": "Thanks!"}, row["messages"][1]]
    plain = tiny.write_rows(tmp_path / "plain.jsonl", made)
    weighted = [
        {"messages": [m | ({"weight": 0} if i == 1 else {}) for i, m in enumerate(row["messages"])]} for row in made
    ]
    weights = tiny.write_rows(tmp_path / "weights.jsonl", weighted)
    options: dict[str, Any] = {"training": {"max_steps": 4, "tokens_per_pass": 600}}

    def adapter(name: str, rows: Path, train_on: str) -> dict[str, bytes]:
        values = tiny.recipe_values(tiny_llama, rows, tmp_path / name, **options)
        values["data"]["train_on"] = train_on
        return folder_bytes(quietly(tiny.write_recipe(tmp_path / f"{name}.yaml", values)).folder / "adapter")

    last = adapter("last", plain, "last_answer")
    assert adapter("weighted", weights, "answers") == last
    assert adapter("all", plain, "answers") != last


def test_a_run_is_not_resumed_with_another_recipe(make_recipe: Recipes) -> None:
    recipe = make_recipe(training={"max_steps": 2})
    run = quietly(recipe).folder
    before = folder_bytes(run)
    with pytest.raises(RequestError, match=r"adapter\.r: 4 then, 8 now"):
        quietly(recipe, ("adapter.r=8",), resume=True)
    with pytest.raises(RequestError, match=r"training\.max_steps: 2 then, 3 now"):
        quietly(recipe, ("training.max_steps=3",), resume=True)
    with pytest.raises(RequestError, match=r"--resume.*--overwrite"):
        quietly(recipe, resume=True, overwrite=True)
    assert folder_bytes(run) == before
    quietly(recipe, ("training.tokens_per_pass=400", "evaluation.samples=3"), resume=True)


def test_a_finished_run_resumed_is_finished(make_recipe: Recipes) -> None:
    recipe = make_recipe(training={"max_steps": 6})
    run = quietly(recipe).folder
    before = folder_bytes(run / "adapter")
    again = quietly(recipe, resume=True)
    assert folder_bytes(run / "adapter") == before
    assert again.result["steps"] == 6
    assert len(records(run, "train")) == 6


def test_overwriting_leaves_nothing_of_the_run_before(make_recipe: Recipes) -> None:
    recipe = make_recipe(training={"max_steps": 6})
    run = quietly(recipe).folder
    for stale in ("evaluation.json", "merge.json", "report/index.html"):
        own(run, stale)
        (run / stale).parent.mkdir(exist_ok=True)
        (run / stale).write_text("{}")
    quietly(recipe, ("training.max_steps=2",), overwrite=True)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002"]
    assert len(records(run, "train")) == 2
    assert not any((run / stale).exists() for stale in ("evaluation.json", "merge.json", "report/index.html"))


def test_what_a_kill_left_of_the_first_file_does_not_block_the_run(make_recipe: Recipes, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".topwork-new-recipe.yaml-0123abcd").write_text("model:")
    run = quietly(make_recipe(training={"max_steps": 1})).folder
    assert not list(run.glob(".topwork-*"))


# What stops a run


def test_a_loss_that_is_no_number_names_its_rows_and_keeps_the_state_before(make_recipe: Recipes) -> None:
    heard = Heard()
    recipe = make_recipe(training={"learning_rate": 1e30, "eval_steps": 100, "max_steps": 10})
    with pytest.raises(NonFiniteLossError) as caught:
        quietly(recipe, progress=heard)
    told = str(caught.value)
    run = recipe.with_suffix("")
    step = records(run, "train")[-1]["step"]
    assert f"step {step + 1}: the loss is nan" in told
    named = [part.split(".")[0].split(",")[0] for part in told.split("train.jsonl:")[1:]]
    assert len(named) == 4
    assert all(1 <= int(line) <= 40 for line in named)
    assert (run / "checkpoints" / f"step-{step:06d}" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (run / "adapter").exists()
    assert heard.done == 1
    page = report(run).html.read_text("utf-8")
    assert f"The run diverged after step {step} of 10" in page
    assert page.count("the loss is nan") == 1


class Poisoned(Sft):
    """NaN from a step on."""

    def __init__(self, after: int) -> None:
        self.calls, self.after = 0, after

    def __call__(self, logprobs: torch.Tensor, batch: Any) -> Loss:
        loss = super().__call__(logprobs, batch)
        self.calls += logprobs.requires_grad
        return loss if self.calls <= self.after else replace(loss, total=loss.total + math.nan)


def test_what_was_saved_before_a_nan_is_not_written_anew(make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    import topwork.run.training

    training = {"tokens_per_pass": 100_000, "max_steps": 8}
    whole = quietly(make_recipe("whole", training=training)).folder
    monkeypatch.setattr(topwork.run.training, "objective_of", lambda _: Poisoned(after=4))
    recipe = make_recipe("poisoned", training=training)
    with pytest.raises(NonFiniteLossError, match="step 5: the loss is nan"):
        quietly(recipe)
    monkeypatch.undo()
    assert json.loads((recipe.with_suffix("") / "result.json").read_text("utf-8"))["stopped"] == "diverged"
    run = quietly(recipe, resume=True).folder
    assert folder_bytes(run / "adapter") == folder_bytes(whole / "adapter")
    warnings = json.loads((run / "result.json").read_text("utf-8"))["warnings"]
    assert warnings == json.loads((whole / "result.json").read_text("utf-8"))["warnings"]  # none of the divergence


@pytest.mark.parametrize("where", ["fsync", "safetensors"])
def test_a_full_disk_ends_the_run_and_not_what_was_saved(
    where: str, make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    import topwork.training.checkpoint as checkpoint

    whole = quietly(make_recipe("whole")).folder
    recipe = make_recipe("full")
    run = recipe.with_suffix("")
    states: dict[str, dict[str, bytes]] = {}

    def full(*_: Any) -> None:
        if not (run / "checkpoints" / "step-000006").is_dir():
            return proper(*_)
        states.setdefault("before", folder_bytes(run / "checkpoints" / "step-000006"))
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = (os, "fsync") if where == "fsync" else (checkpoint, "save_file")
    proper = getattr(owner, name)
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(RunError, match=r"the disk is full: .*--resume"):
        quietly(recipe)
    monkeypatch.undo()
    assert states["before"] == folder_bytes(run / "checkpoints" / "step-000006")
    assert not (run / "checkpoints" / "step-000008").exists()
    assert not list(run.rglob(".topwork-*"))
    assert folder_bytes(quietly(recipe, resume=True).folder / "adapter") == folder_bytes(whole / "adapter")


# What the validations decide


@pytest.fixture
def contradicted(make_recipe: Recipes, tmp_path: Path) -> Recipes:
    """contradicted(name, **training): validation asks for other answers than training teaches, so it can only rise
    once the form is learned."""

    def answering(file: str, answer: str) -> str:
        made = tiny.rows(8)
        for row in made:
            row["messages"][1]["content"] = answer
        return str(tiny.write_rows(tmp_path / file, made))

    data = {"train": answering("one.jsonl", "yes " * 12), "eval": answering("other.jsonl", "NO! " * 12)}
    steps = {"max_steps": 24, "eval_steps": 3, "save_steps": 24}

    def make(name: str, **training: Any) -> Path:
        return make_recipe(name, data=data, adapter={"lora_dropout": 0.0}, training={**LONG, **steps, **training})

    return make


def test_overfitting_is_noted_and_the_best_is_kept(contradicted: Recipes) -> None:
    heard = Heard()
    best = quietly(contradicted("best"), progress=heard)
    losses = {record["step"]: record["loss"] for record in records(best.folder, "eval") if record["step"]}
    lowest = min(losses, key=lambda step: losses[step])
    assert 0 < lowest < 24, losses
    assert best.result["best_step"] == lowest
    assert best.result["eval_loss_after"] == losses[lowest]
    tensors = "adapter_model.safetensors"
    kept = best.folder / "checkpoints" / f"step-{lowest:06d}" / "adapter" / tensors
    assert (best.folder / "adapter" / tensors).read_bytes() == kept.read_bytes()

    notes = [note for note in heard.notes if "overfitting" in note]
    assert notes
    assert all("validation loss has risen since step" in note for note in notes)
    assert best.result["warnings"][: len(heard.notes)] == heard.notes  # before those of the plan

    last = quietly(contradicted("last", load_best_model_at_end=False))
    assert last.result["eval_loss_after"] == losses[24] > losses[lowest]
    newest = last.folder / "checkpoints" / "step-000024" / "adapter" / tensors
    assert (last.folder / "adapter" / tensors).read_bytes() == newest.read_bytes()
    assert newest.read_bytes() != kept.read_bytes()


def test_patience_ends_a_run_that_gets_no_better_and_a_resume_does_not_go_on(contradicted: Recipes) -> None:
    recipe = contradicted("stopped", early_stopping_patience=2, load_best_model_at_end=False)
    run = quietly(recipe)
    losses = [record["loss"] for record in records(run.folder, "eval")]
    assert run.result["stopped"] == "early stopping"
    assert run.result["steps"] < 24
    assert min(losses[1:]) == losses[-3]
    before = folder_bytes(run.folder / "adapter")
    again = quietly(recipe, resume=True)
    assert again.result["stopped"] == "early stopping"
    assert again.result["steps"] == run.result["steps"]
    assert folder_bytes(run.folder / "adapter") == before


def test_the_bare_base_is_never_the_best(make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that only gets worse still gives the best of what it trained, and says with which loss."""
    import topwork.training.loop

    losses = iter([1.0, 3.0, 2.0, 2.5])
    monkeypatch.setattr(topwork.training.loop, "mean_losses", lambda *_: {"run": Means(next(losses), {})})
    run = quietly(make_recipe(training={"max_steps": 6, "eval_steps": 2}))
    assert run.result["eval_loss_before"] == 1.0
    assert (run.result["best_step"], run.result["best_eval_loss"], run.result["eval_loss_after"]) == (4, 2.0, 2.0)
    kept = run.folder / "checkpoints" / "step-000004" / "adapter"
    assert folder_bytes(kept) == {
        name: content for name, content in folder_bytes(run.folder / "adapter").items() if name != "manifest.json"
    }


def test_without_validation_the_last_step_counts(make_recipe: Recipes) -> None:
    run = quietly(make_recipe(data={"eval_fraction": 0.0}, training={"max_steps": 3}))
    assert run.result["eval_loss_after"] is None
    assert (run.folder / "adapter" / "adapter_config.json").is_file()
    assert records(run.folder, "eval") == []


def test_running_out_of_memory_says_what_to_do(make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    import topwork.training.loop

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(topwork.training.loop, "train_step", full)
    with pytest.raises(RunError, match=r"step 1 with 400 tokens per pass.*--resume --set training.tokens_per_pass=200"):
        quietly(make_recipe(training={"tokens_per_pass": 400}))


def test_a_validation_that_is_no_number_ends_the_run(make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    import topwork.training.loop

    losses = iter([1.0, 0.9, math.nan])
    monkeypatch.setattr(topwork.training.loop, "mean_losses", lambda *_: {"run": Means(next(losses), {})})
    recipe = make_recipe(training={"eval_steps": 2, "save_steps": 2})
    with pytest.raises(NonFiniteLossError, match="validation loss at step 4 is nan"):
        quietly(recipe)
    run = recipe.with_suffix("")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert "The run diverged after step 4 of " in report(run).html.read_text("utf-8")


def memory(total_bytes: int) -> Memory:
    """For LoRA on SmolLM2's shape."""
    named = {"model_name_or_path": "smollm2-135m"}
    recipe = recipe_of({"model": named, "data": {"train": "rows"}})
    return Memory(setup_of([recipe], structure_named(recipe.model)), total_bytes)


@pytest.mark.parametrize(
    ("asked", "longest", "free_bytes", "expected"),
    [
        (None, 100, 2**40, 2048),
        (None, 5000, 2**40, 5000),
        (None, 100, 0, 256),
        (None, 400, 0, 400),
        (300, 300, 0, 300),
    ],
)
def test_the_size_of_a_pass(asked: int | None, longest: int, free_bytes: int, expected: int) -> None:
    plan = plan_passes(asked, "off", longest, memory(free_bytes))
    assert plan.tokens_per_pass == expected


def test_a_pass_too_small_for_the_longest_sequence() -> None:
    with pytest.raises(RequestError, match="Give at least 301"):
        plan_passes(300, "off", 301, memory(2**40))
