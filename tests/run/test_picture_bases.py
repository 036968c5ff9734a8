"""Runs on a base that reads pictures too: trained on text, merged into a model that still reads both."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from reference.families import alone, sequences
from reference.measure import relative
from run import pictures, tiny
from run.fixtures import Said
from topwork.run.merge import merge
from topwork.run.opened import open_run
from topwork.run.train import train

SHORT = {"max_steps": 3, "eval_steps": 3, "save_steps": 3, "learning_rate": 0.02}
EVERYTHING = ("config.json", "generation_config.json", "tokenizer.json", *pictures.PROCESSOR)


def silent(_: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write_model(tmp_path_factory.mktemp("gemma") / "base")


def trained(base: Path, tickets: Path, folder: Path, log: Callable[[str], None] = silent, **changes: object) -> Path:
    values = tiny.recipe_values(base, tickets, folder / "run", training=SHORT, **changes)
    return train(tiny.write_recipe(folder / "recipe.yaml", values), log=log).folder


def whole(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("packed", [False, True])
def test_trained_said_and_merged(gemma: Path, tickets: Path, tmp_path: Path, packed: bool) -> None:
    said: list[str] = []
    held = {"quantization": {"load_in_4bit": True}} if packed else {}
    run = trained(gemma, tickets, tmp_path, said.append, **held)
    assert any("goes into model.language_model, and not into vision_tower" in line for line in said)
    result = json.loads((run / "result.json").read_text("utf-8"))
    assert result["eval_loss_after"] < result["eval_loss_before"]
    found = merge(run, tmp_path / "out", log=silent)
    assert found["verdict"]["grade"] == "same", found["verdict"]["text"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= set(EVERYTHING)
    merged = whole(tmp_path / "out")
    assert type(merged).__name__ == "Gemma3ForConditionalGeneration"
    opened = open_run(run, log=silent)
    with torch.no_grad():
        ours = torch.cat([
            opened.base.logits(_batch(part, "default"), torch.arange(len(part))) for part in sequences()
        ])  # fmt: skip
        assert relative(alone(merged, sequences()), ours) <= 1e-5
    base, now = whole(gemma).state_dict(), merged.state_dict()
    tower = [key for key in base if "vision_tower" in key or "multi_modal" in key]
    assert tower
    assert all(torch.equal(base[key], now[key]) for key in tower)


def _batch(part: torch.Tensor, adapter: str):  # type: ignore[no-untyped-def]
    from topwork.ops.batch import batch_of

    return batch_of([part], adapter)


def test_all_that_writes_a_model_keeps_the_processor(topwork: Callable[..., Said], gemma: Path, tmp_path: Path) -> None:
    for name, arguments in {
        "nf4": ("quantize", gemma, tmp_path / "nf4"),
        "hf": ("export", gemma, tmp_path / "hf", "--format", "hf"),
    }.items():
        said = topwork(*arguments)
        assert said.code == 0, said.err
        assert {path.name for path in (tmp_path / name).iterdir()} >= set(pictures.PROCESSOR)
    said = topwork("count", tmp_path / "nf4", "--rank", 4, "--json")
    assert said.code == 0, said.err
    rows = {row["target_set"]: row["target_modules"] for row in json.loads(said.out)["table"]}
    assert rows["q,k,v,o"] == [f"self_attn.{name}_proj" for name in "koqv"]


def test_a_model_that_was_written_packed_is_a_base(
    gemma: Path, tickets: Path, topwork: Callable[..., Said], tmp_path: Path
) -> None:
    assert topwork("quantize", gemma, tmp_path / "nf4").code == 0
    run = trained(tmp_path / "nf4", tickets, tmp_path)
    assert topwork("merge", run, tmp_path / "out", "--check", 1).code == 0
    assert type(whole(tmp_path / "out")).__name__ == "Gemma3ForConditionalGeneration"


def test_what_no_text_part_is_known_of_is_refused_in_one_line(
    topwork: Callable[..., Said], tickets: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("smolvlm").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    values = tiny.recipe_values(tmp_path / "base", tickets, tmp_path / "run")
    said = topwork("train", tiny.write_recipe(tmp_path / "recipe.yaml", values))
    assert said.code == 2
    assert "'smolvlm'" in said.err
    assert "LlamaConfig" not in said.err
