"""What a run says of an adapter that is not better than its base."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from run.fixtures import Said
from run.tiny import write_rows
from topwork.run.train import train

PLAN = {"max_steps": 4, "eval_steps": 2, "warmup_steps": None}


def test_twelve_rows_by_the_default_recipe_train(
    make_recipe: Callable[..., Path], tickets: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(tickets.read_text().splitlines(keepends=True)[:12]))
    training = {"max_steps": None, "warmup_steps": None, "batch_size": 16, "eval_steps": None}
    run = train(make_recipe(data={"train": str(few)}, training=training), log=lambda _: None)
    [step] = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert step["learning_rate"] == 5e-3
    assert run.result["eval_loss_after"] < run.result["eval_loss_before"]
    assert run.result["better_than_base"] is True
    assert not [told for told in run.result["warnings"] if "learned nothing" in told]


@pytest.mark.parametrize("best", [True, False])
def test_a_base_that_was_better_is_told(
    best: bool, make_recipe: Callable[..., Path], topwork: Callable[..., Said], tmp_path: Path
) -> None:
    other = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "~^|\\ #@"}]}] * 3
    held_out = write_rows(tmp_path / "other.jsonl", other)
    training = {**PLAN, "learning_rate": 0.05, "load_best_model_at_end": best}
    said = topwork("train", make_recipe(training=training, data={"eval": str(held_out), "eval_fraction": 0.0}))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["better_than_base"] is False
    [told] = [text for text in result["warnings"] if "the base without the adapter is better" in text]
    kept = f"{result['eval_loss_after']:.4f} with the adapter of step {result['best_step'] if best else 4}"
    assert f"{result['eval_loss_before']:.4f}, and {kept}" in told
    assert told in said.out
    assert "lowest at step" not in said.out
    assert "NOT better than the base without this training" in said.out


@pytest.mark.parametrize("adapter", [{"method": "lora"}, {"method": "ia3"}], ids=lambda adapter: adapter["method"])
def test_an_adapter_that_learned_nothing_is_told(adapter: dict[str, str], make_recipe: Callable[..., Path]) -> None:
    recipe = make_recipe(training={**PLAN, "learning_rate": 1e-60, "weight_decay": 0.1})
    values = recipe.read_text().replace("lora_dropout: 0.1", "lora_dropout: 0.0")
    recipe.write_text(values)
    if adapter["method"] != "lora":
        import yaml

        recipe.write_text(yaml.safe_dump({**yaml.safe_load(values), "adapter": adapter}))
    result = train(recipe, log=lambda _: None).result
    assert [text for text in result["warnings"] if "learned nothing" in text]
    assert result["better_than_base"] is False


def test_a_warm_up_longer_than_the_run_is_told_before_it(make_recipe: Callable[..., Path]) -> None:
    run = train(make_recipe(training={**PLAN, "warmup_steps": 100}), log=lambda _: None)
    told = "warmup_steps is 100 and the run has 4 steps: the learning rate reaches 4 % of its peak"
    assert run.result["warnings"][0].startswith(told)
    first = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["kind"], first["step"]) == ("note", 0)
