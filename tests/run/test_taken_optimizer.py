"""`training.init_optimizer: taken`: a run that begins from another's adapter goes on with its optimizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from run import tiny
from topwork.common.errors import CheckpointError, RecipeError, RequestError
from topwork.recipe.recipe import load_recipe
from topwork.run.beginning_from import optimizer_of
from topwork.run.train import train, train_together

STEADY = {
    "learning_rate": 0.01, "lr_scheduler_type": "constant", "warmup_steps": 0, "batch_size": 1, "weight_decay": 0.01,
    "eval_steps": 100, "save_steps": 1, "save_total_limit": 9, "load_best_model_at_end": False,
}  # fmt: skip
"""One row, so that each step is of the same batch, and no dropout: what a step gives follows from weights and
optimizer."""
MakeRecipe = Callable[..., Path]


def quiet(_: str) -> None:
    return None


@pytest.fixture
def make_steady(make_recipe: MakeRecipe, tmp_path: Path) -> MakeRecipe:
    rows = tiny.write_rows(tmp_path / "one.jsonl", tiny.rows(1))

    def make(name: str, adapter: dict[str, Any], **training: Any) -> Path:
        path = make_recipe(name, training={**STEADY, **training}, data={"train": str(rows), "eval_fraction": 0.0})
        values = yaml.safe_load(path.read_text("utf-8"))
        values["adapter"] = adapter
        return tiny.write_recipe(path, values)

    return make


def adapter_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_the_first_step_is_that_of_the_run_that_went_on(make_steady: MakeRecipe, optim: str) -> None:
    first = train(make_steady("first", {"r": 4, "lora_alpha": 8}, max_steps=5, optim=optim), log=quiet).folder
    start = {"init_from": str(first / "checkpoints" / "step-000003")}
    said: list[str] = []
    taken = train(make_steady("taken", start, max_steps=2, optim=optim, init_optimizer="taken"), log=said.append).folder
    fresh = train(make_steady("fresh", start, max_steps=2, optim=optim), log=quiet).folder
    assert any("its optimizer goes on from step 3" in line for line in said)
    assert any("the optimizer taken along" in line for line in said)
    for step in (1, 2):
        went_on, now = adapter_at(first, 3 + step), adapter_at(taken, step)
        assert went_on.keys() == now.keys()
        assert all(torch.equal(went_on[key], now[key]) for key in now), "its moments and step counts are the run's"
        assert any(not torch.equal(went_on[key], tensor) for key, tensor in adapter_at(fresh, step).items())
    origin = json.loads((taken / "provenance.json").read_text("utf-8"))["begun_from"]
    assert origin["optimizer_of"] == "step-000003"


def test_of_a_finished_run_it_is_the_checkpoint_with_its_weights(make_steady: MakeRecipe) -> None:
    first = train(make_steady("first", {"r": 4, "lora_alpha": 8}, max_steps=3), log=quiet).folder
    assert optimizer_of(first).name == "step-000003"
    shutil.copytree(first / "checkpoints" / "step-000001" / "adapter", first / "adapter", dirs_exist_ok=True)
    assert optimizer_of(first).name == "step-000001"
    assert optimizer_of(first / "checkpoints" / "step-000002").name == "step-000002"
    shutil.rmtree(first / "checkpoints" / "step-000001")
    with pytest.raises(RequestError, match=r"no checkpoint of .* holds the optimizer of its finished adapter"):
        optimizer_of(first)


def test_it_is_resumed_to_the_same_bytes(make_steady: MakeRecipe) -> None:
    first = train(make_steady("first", {"r": 4, "lora_alpha": 8}, max_steps=2), log=quiet).folder
    start = {"init_from": str(first)}
    whole = train(make_steady("whole", start, max_steps=3, init_optimizer="taken"), log=quiet).folder
    path = make_steady("parted", start, max_steps=3, init_optimizer="taken")
    train_together([load_recipe(path)], stop_at=1, log=quiet)
    parted = train(path, resume=True, log=quiet).folder
    assert all(torch.equal(tensor, adapter_at(parted, 3)[key]) for key, tensor in adapter_at(whole, 3).items())


def test_what_has_none_is_told_before_a_base_is_read(make_steady: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"training.init_optimizer is taken, which takes along that of"):
        load_recipe(make_steady("nothing", {"r": 4}, max_steps=1, init_optimizer="taken"))
    first = train(make_steady("first", {"r": 4, "lora_alpha": 8}, max_steps=1), log=quiet).folder
    alone = shutil.copytree(first / "adapter", tmp_path / "alone")
    path = make_steady("alone-on", {"init_from": str(alone)}, max_steps=1, init_optimizer="taken")
    with pytest.raises(RequestError, match="an adapter's own folder holds no optimizer"):
        train(path, log=quiet)
    path = make_steady("other", {"init_from": str(first)}, max_steps=1, optim="adamw_8bit", init_optimizer="taken")
    with pytest.raises(CheckpointError, match="was saved with AdamW, not with AdamW8bit"):
        train(path, log=quiet)
