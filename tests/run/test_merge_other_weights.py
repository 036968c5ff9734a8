"""`merge --base 16bit` after a training on a quantized base: how exact the fold is, and how far the answers have moved
from what was trained, against transformers' own logits of the run and of what was written."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from run import tiny
from run.fixtures import Said
from topwork.common.errors import RunError
from topwork.merging import stream
from topwork.merging.threshold import verdict
from topwork.merging.verify import Comparison, Verification
from topwork.ops.batch import batch_of
from topwork.run.folder import ADAPTER_NAME
from topwork.run.given import given_adapter
from topwork.run.merge import merge
from topwork.run.merging.inputs import merge_inputs
from topwork.run.opened import open_run
from topwork.run.train import train


def silent(_: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    training = {"max_steps": 4, "eval_steps": 4, "learning_rate": 0.02}
    values = tiny.recipe_values(
        tiny_llama, tickets, folder / "run", training=training, quantization={"load_in_4bit": True}
    )
    return train(tiny.write_recipe(folder / "recipe.yaml", values), log=silent).folder


def furthest(run: Path, merged: Path, quantized: bool) -> float:
    """The largest difference of a kept row's logits from the run's adapter on its base, as a share of the largest."""
    inputs = [torch.tensor(tokens) for tokens in merge_inputs(given_adapter(run), 100, None, silent).sequences]
    opened = open_run(run, log=silent, quantized=quantized)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    worst = size = 0.0
    with torch.no_grad():
        for tokens in inputs:
            theirs = model(input_ids=tokens[None]).logits[0][-64:]
            ours = opened.base.logits(batch_of([tokens], ADAPTER_NAME), torch.arange(len(tokens)))[-64:]
            worst = max(worst, float((theirs - ours).abs().max()))
            size = max(size, float(ours.abs().max()))
    return worst / size


def test_both_numbers_are_right(run: Path, tmp_path: Path) -> None:
    found = merge(run, tmp_path / "out", base="16bit", log=silent)
    assert found["verdict"]["grade"] == "other weights"
    moved, folded = found["largest_relative_difference"], found["fold"]["largest_relative_difference"]
    assert moved == pytest.approx(furthest(run, tmp_path / "out", quantized=True), rel=0.02)
    assert moved > 1e-2
    assert folded <= 1e-5
    assert furthest(run, tmp_path / "out", quantized=False) <= 1e-5
    assert found["mean_kl"] > found["fold"]["mean_kl"]
    told = found["verdict"]["text"]
    assert f"{moved:.1e} of the largest one" in told
    assert f"logits within {folded:.1e}" in told
    assert re.search(r"perplexity [\d.]+ -> [\d.]+", told)
    own = merge(run, tmp_path / "own", log=silent)
    assert own["fold"] is None
    assert own["largest_relative_difference"] <= 1e-5


def test_the_command_prints_both(topwork: Callable[..., Said], run: Path, tmp_path: Path) -> None:
    said = topwork("merge", run, tmp_path / "out", "--base", "16bit", "--check", 5)
    assert said.code == 0, said.err
    fold, moved = said.out.index("how exact the fold is"), said.out.index("how far the answers have moved")
    assert fold < moved
    found = json.loads((tmp_path / "out" / "merge.json").read_text("utf-8"))
    for at, figures in ((fold, found["fold"]), (moved, found)):
        assert f"{figures['mean_kl']:.3g}" in said.out[at:]


def test_a_wrong_fold_is_no_excuse(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "folded", lambda _, weight, bias: (weight.float(), bias))
    with pytest.raises(RunError, match="is not adapter and 16-bit weights together: its logits differ by"):
        merge(run, tmp_path / "out", base="16bit", log=silent)
    assert not (tmp_path / "out").exists()


def test_the_verdict_asks_the_rules_of_the_fold_alone() -> None:
    exact, wrong = Comparison(1e-5, 1e-6, 1e-5, 1.0, 1e-9), Comparison(1.0, 0.1, 1.0, 0.5, 0.3)

    def found(fold: Comparison | None) -> Verification:
        return Verification(1.0, 0.2, 1.0, 0.9, 0.08, 0.3, 2.0, 2.5, 1.0, 1.0, 10, fold)

    judged = verdict(found(exact), torch.float32, changes_base=True)
    assert judged.grade == "other weights"
    assert "perplexity 2 -> 2.5" in judged.text
    assert "KL 0.08 nats" in judged.text
    assert verdict(found(wrong), torch.float32, changes_base=True).grade == "another"
    assert verdict(found(None), torch.float32, changes_base=True).grade == "other weights"
