"""Patterns whose keys overlap, through a run: what is trained is what is evaluated, merged and gone on with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from topwork.common.errors import RecipeError, RequestError
from topwork.ops.batch import batch_of
from topwork.recipe.recipe import load_recipe
from topwork.run.merge import merge
from topwork.run.opened import open_run
from topwork.run.train import train

MakeRecipe = Callable[..., Path]
GENERAL_FIRST: dict[str, Any] = {
    "r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 100.0, "layers.0.self_attn.q_proj": 1.0, "down_proj": 2.0},
    "rank_pattern": {"mlp.up_proj": 3, "layers.1.mlp.up_proj": 2},
}  # fmt: skip
"""Sorted, the special keys would come first."""
SHORT = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "learning_rate": 0.02}


def quiet(_: str) -> None:
    return None


def recipe(make_recipe: MakeRecipe, name: str, adapter: dict[str, Any]) -> Path:
    path = make_recipe(name, training=SHORT)
    return with_adapter(path, adapter)


def with_adapter(path: Path, adapter: dict[str, Any]) -> Path:
    """The order of its keys kept."""
    values = {**yaml.safe_load(path.read_text("utf-8")), "adapter": adapter}
    path.write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")
    return path


def turned(adapter: dict[str, Any]) -> dict[str, Any]:
    return {**adapter, "alpha_pattern": dict(reversed(adapter["alpha_pattern"].items()))}


def test_what_is_trained_is_what_is_read(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = recipe(make_recipe, "run", GENERAL_FIRST)
    run = train(path, log=quiet).folder
    opened = open_run(run, log=quiet)
    scales = {place: part.setting for place, part in opened.adapters.parts("default").items() if "q_proj" in place}
    assert set(scales.values()) == {25.0}
    ranks = {len(part.lora_A) for place, part in opened.adapters.parts("default").items() if "up_proj" in place}
    assert ranks == {3}
    result = json.loads((run / "result.json").read_text("utf-8"))
    again = train(recipe(make_recipe, "on", {"init_from": str(run)}), log=quiet).folder
    assert json.loads((again / "result.json").read_text("utf-8"))["eval_loss_before"] == result["eval_loss_after"]

    merge(run, tmp_path / "merged", log=quiet, check=0)
    text = torch.tensor([[5, 9, 13, 7, 21]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(text).logits[0]
        own = opened.base.logits(batch_of([text[0]], "default"), torch.arange(5))
    assert (merged - own).abs().max() < 1e-5 * own.abs().max()


def test_another_order_is_another_recipe(make_recipe: MakeRecipe) -> None:
    path = recipe(make_recipe, "run", GENERAL_FIRST)
    run = train(path, log=quiet).folder
    with_adapter(path, turned(GENERAL_FIRST))
    with pytest.raises(RequestError, match=r"begun with another recipe \(adapter.alpha_pattern"):
        train(path, log=quiet, resume=True)
    given = {"init_from": str(run), "alpha_pattern": turned(GENERAL_FIRST)["alpha_pattern"]}
    with pytest.raises(RecipeError, match=r"adapter.alpha_pattern is .* here and .* in "):
        load_recipe(recipe(make_recipe, "on", given))
    same = {"init_from": str(run), "alpha_pattern": GENERAL_FIRST["alpha_pattern"]}
    assert list(load_recipe(recipe(make_recipe, "on", same)).adapter.alpha_pattern) == list(same["alpha_pattern"])
