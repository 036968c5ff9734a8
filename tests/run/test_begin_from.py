"""Training on from an adapter: `adapter.init_from`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from run import tiny
from topwork.adapters.config import AdapterConfig
from topwork.common.errors import AdapterError, RecipeError, RequestError
from topwork.common.files import sha256_file
from topwork.recipe.recipe import load_recipe
from topwork.reporting.sweep_state import SWEEP
from topwork.run.beginning_from import start_of
from topwork.run.folder import read_recipe
from topwork.run.sweep.plan import SweepOptions, plan_sweep
from topwork.run.train import train, train_together

SHORT = {"max_steps": 2, "eval_steps": 1, "save_steps": 1, "learning_rate": 0.01}
MakeRecipe = Callable[..., Path]


def quiet(_: str) -> None:
    return None


def begun(make_recipe: MakeRecipe, start: Path, name: str = "on", **changes: Any) -> Path:
    """A recipe that says no more of its adapter than where it begins, and `adapter`."""
    path = make_recipe(name, **{"training": SHORT, **{k: v for k, v in changes.items() if k != "adapter"}})
    values = yaml.safe_load(path.read_text("utf-8"))
    values["adapter"] = {"init_from": str(start), **changes.get("adapter", {})}
    return tiny.write_recipe(path, values)


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text("utf-8"))


def tensors(run: Path) -> dict[str, bytes]:
    return {key: t.numpy().tobytes() for key, t in load_file(run / "adapter" / "adapter_model.safetensors").items()}


def test_it_begins_where_the_other_ended(trained: Path, make_recipe: MakeRecipe) -> None:
    said: list[str] = []
    run = train(begun(make_recipe, trained), log=said.append).folder
    assert result(run)["eval_loss_before"] == result(trained)["eval_loss_after"]
    assert any(f"begins from {trained / 'adapter'}" in line for line in said)
    was, now = read_recipe(trained).adapter, read_recipe(run).adapter
    assert now == was.model_copy(update={"init_from": str(trained)})
    origin = json.loads((run / "provenance.json").read_text("utf-8"))["begun_from"]
    file = trained / "adapter" / "adapter_model.safetensors"
    assert (origin["path"], origin["sha256"]) == (str(trained), sha256_file(file))
    assert tensors(run) != tensors(trained)


METHODS: dict[str, dict[str, Any]] = {
    "dora": {"method": "dora"},
    "patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "modules_to_save": ["norm"]},
    "pissa": {"init_lora_weights": "pissa"},
    "ia3": {"method": "ia3"},
    "vera": {"method": "vera", "r": 6},
    "lokr": {"method": "lokr", "r": 2},
    "oft": {"method": "oft", "oft_block_size": 8},
    "prefix": {"method": "prefix", "num_virtual_tokens": 3},
    "prompt": {"method": "prompt", "num_virtual_tokens": 3},
    "full": {"method": "full"},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_does(name: str, make_recipe: MakeRecipe) -> None:
    path = make_recipe("first", training=SHORT)
    values = yaml.safe_load(path.read_text("utf-8")) | {"adapter": {"r": 4, **METHODS[name]}}
    if "method" in METHODS[name] and name != "dora":
        values["adapter"] = METHODS[name]
    first = train(tiny.write_recipe(path, values), log=quiet).folder
    run = train(begun(make_recipe, first), log=quiet).folder
    assert result(run)["eval_loss_before"] == result(first)["eval_loss_after"]
    assert read_recipe(run).adapter.method == read_recipe(first).adapter.method
    of_file = first.parent / "alone"  # no run: the PEFT folder tells what it is
    shutil.copytree(first / "adapter", of_file)
    told = begun(make_recipe, of_file, "alone-on")
    assert load_recipe(told).adapter.method == read_recipe(first).adapter.method
    if name == "pissa":  # stored as the LoRA of twice the rank that it is
        alone = train(told, log=quiet).folder
        assert result(alone)["eval_loss_before"] == pytest.approx(result(first)["eval_loss_after"], rel=1e-5)


def test_what_is_given_has_to_agree(trained: Path, make_recipe: MakeRecipe) -> None:
    def recipe(**adapter: Any) -> AdapterConfig:
        return load_recipe(begun(make_recipe, trained, adapter=adapter)).adapter

    assert recipe(r=4, lora_alpha=8, method="lora", target_modules="all-linear").dropout == 0.1
    assert recipe(lora_dropout=0.0).dropout == 0.0, "dropout is about training alone"
    for given, told in {
        "r": (8, "adapter.r is 8 here and 4 in "), "lora_alpha": (99, "adapter.lora_alpha is 99 here and 8.0 in "),
        "method": ("ia3", "adapter.method is ia3 here and lora in "), "use_rslora": (True, "use_rslora is True here"),
        "init_lora_weights": ("pissa", "init_lora_weights is 'pissa' here and True in"),
        "modules_to_save": (["norm"], r"modules_to_save is \['norm'\] here and None in"),
        "lora_alhpa": (8, "unknown key 'adapter.lora_alhpa'"),
    }.items():  # fmt: skip
        with pytest.raises(RecipeError, match=told[1]):
            recipe(**{given: told[0]})
    with pytest.raises(AdapterError, match=r"target_modules is \[.q_proj.\] here and .all-linear. there: .*unknown"):
        train(begun(make_recipe, trained, adapter={"target_modules": ["q_proj"]}), log=quiet)


def test_a_beginning_by_loftq_stands_in_the_weights(trained: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(trained, start)
    values = yaml.safe_load((start / "recipe.yaml").read_text("utf-8"))
    values["adapter"]["init_lora_weights"] = "loftq"
    tiny.write_recipe(start / "recipe.yaml", values)
    for given in ({}, {"init_lora_weights": "loftq"}, {"init_lora_weights": True}):
        adapter = load_recipe(begun(make_recipe, start, adapter=given)).adapter
        assert adapter.init_lora_weights is True  # type: ignore[union-attr]


def test_what_can_not_be_begun_from(trained: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    def refused(place: object, **changes: Any) -> str:
        with pytest.raises(RequestError) as caught:
            train(begun(make_recipe, place, **changes), log=quiet)  # type: ignore[arg-type]
        assert not (tmp_path / "on").exists()
        return str(caught.value)

    assert f"did you mean '{trained}'" in refused(f"{trained}n")
    (tmp_path / "empty").mkdir()
    assert "is neither a run of `topwork train`" in refused(tmp_path / "empty")
    shutil.copytree(trained / "adapter", tmp_path / "several" / "mine")
    assert "it holds mine: give one of them" in refused(tmp_path / "several")
    shutil.copytree(trained, tmp_path / "own" / "first")
    assert "in the run's own output_dir" in refused(tmp_path / "own" / "first", output_dir=str(tmp_path / "own"))
    other = tiny.write_model(tmp_path / "other", seed_shift=0.01)
    assert "their weights differ" in refused(trained, model={"model_name_or_path": str(other)})
    (tmp_path / "own" / "first" / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    assert "no readable adapter_model.safetensors" in refused(tmp_path / "own" / "first")


def test_a_run_that_has_no_adapter_yet_gives_its_newest_whole_checkpoint(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert start_of(run, quiet).folder == run / "adapter"
    shutil.rmtree(run / "adapter")
    newest, *_ = sorted(run.glob("checkpoints/step-*"), reverse=True)
    assert start_of(run, quiet).folder == newest / "adapter"
    (newest / "state.json").write_bytes(b"torn")
    assert start_of(run, quiet).folder.parent.parent == run / "checkpoints" != newest
    for checkpoint in run.glob("checkpoints/step-*"):
        (checkpoint / "state.json").write_bytes(b"torn")
    with pytest.raises(RequestError, match="no finished adapter and no whole checkpoint"):
        start_of(run, quiet)


def test_one_of_its_checkpoints(trained: Path, make_recipe: MakeRecipe) -> None:
    *_, last = sorted(trained.glob("checkpoints/step-*"))
    said: list[str] = []
    run = train(begun(make_recipe, last), log=said.append).folder
    assert any(f"begins from {last / 'adapter'}" in line for line in said)
    assert read_recipe(run).adapter.lora_dropout == 0.1  # type: ignore[union-attr]


def test_it_is_resumed_when_the_other_is_gone(trained: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(trained, start)
    whole = train(begun(make_recipe, start, "whole"), log=quiet).folder
    path = begun(make_recipe, start, "parted")
    train_together([load_recipe(path)], stop_at=1, log=quiet)
    shutil.move(start, tmp_path / "elsewhere")
    parted = tmp_path / "parted"
    shutil.copytree(parted, tmp_path / "moved")
    assert tensors(train(path, resume=True, log=quiet).folder) == tensors(whole)
    assert tensors(train(tmp_path / "moved", resume=True, log=quiet).folder) == tensors(whole)
    shutil.rmtree(parted / "checkpoints")
    with pytest.raises(AdapterError, match="has no checkpoint to go on from"):
        train(path, resume=True, log=quiet)
    with pytest.raises(RecipeError, match="is not there"):
        load_recipe(begun(make_recipe, start, "another"))


def test_one_that_has_changed_is_another_beginning(trained: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(trained, start)
    path = begun(make_recipe, start)
    run = train(path, log=quiet).folder
    newest, *_ = sorted(start.glob("checkpoints/step-*"))
    shutil.copy(newest / "adapter" / "adapter_model.safetensors", start / "adapter" / "adapter_model.safetensors")
    train(path, resume=True, log=quiet)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RequestError, match=r"begun with another adapter in adapter\.init_from"):
        train(path, resume=True, log=quiet)


def test_its_chat_template_comes_along(make_recipe: MakeRecipe) -> None:
    first = train(make_recipe("first", training=SHORT, data={"chat_template": "chatml"}), log=quiet).folder
    said: list[str] = []
    run = train(begun(make_recipe, first), log=said.append).folder
    assert (run / "chat_template.jinja").read_text("utf-8") == (first / "chat_template.jinja").read_text("utf-8")
    assert any(line.startswith(f"chat template: the one that {first} was trained with") for line in said)
    assert result(run)["eval_loss_before"] == result(first)["eval_loss_after"]
    named = train(begun(make_recipe, first, "named", data={"chat_template": "plain"}), log=quiet).folder
    assert (named / "chat_template.jinja").read_text("utf-8") != (first / "chat_template.jinja").read_text("utf-8")


def test_several_train_on_together(trained: Path, make_recipe: MakeRecipe) -> None:
    recipes = [
        load_recipe(begun(make_recipe, trained, f"rate-{rate}", training={**SHORT, "learning_rate": rate}))
        for rate in (0.001, 0.01)
    ]
    runs = train_together(recipes, log=quiet)
    assert {run.result["eval_loss_before"] for run in runs} == {result(trained)["eval_loss_after"]}
    assert tensors(runs[0].folder) != tensors(runs[1].folder)


def test_a_sweep_over_rates_from_one_adapter(trained: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(trained, start)
    path = begun(make_recipe, start, "swept")
    rates = SweepOptions(("training.learning_rate=0.001,0.01",))
    plan = plan_sweep(path, options=rates)
    assert [trial.recipe.adapter.init_from for trial in plan.trials] == [str(start)] * 2
    with pytest.raises(RecipeError, match=r"adapter\.r is 8 here and 4 in"):
        plan_sweep(path, options=SweepOptions(("adapter.r=4,8",)))
    train(plan.trials[0].recipe, log=quiet)
    (plan.out / SWEEP).touch()
    shutil.rmtree(start)
    again = plan_sweep(path, options=rates)
    assert [trial.recipe.adapter for trial in again.trials] == [trial.recipe.adapter for trial in plan.trials]


def test_over_a_quantized_base(make_recipe: MakeRecipe) -> None:
    packed = {"load_in_4bit": True}
    first = train(make_recipe("first", training=SHORT, quantization=packed), log=quiet).folder
    run = train(begun(make_recipe, first, quantization=packed), log=quiet).folder
    assert result(run)["eval_loss_before"] == result(first)["eval_loss_after"]
    said: list[str] = []
    train(begun(make_recipe, first, "dense"), log=said.append)
    assert any("set quantization as it was there" in line for line in said)


def test_a_recipe_made_in_python(trained: Path, make_recipe: MakeRecipe) -> None:
    made = load_recipe(make_recipe("made", training=SHORT))
    made = made.model_copy(update={"adapter": AdapterConfig(init_from=str(trained))})
    run = train(made, log=quiet).folder
    assert result(run)["eval_loss_before"] == result(trained)["eval_loss_after"]
    assert read_recipe(run).adapter.r == 4  # type: ignore[union-attr]
