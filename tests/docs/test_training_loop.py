"""The blocks of docs/training-loop.md run as they stand there, one after the other, on a tiny base."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run import tiny
from topwork.adapters.peft_format import read_adapter

PAGE = Path(__file__).parents[2] / "docs" / "training-loop.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """run(block) -> what it printed, in a folder of its own; blocks share their names."""
    base = tiny.write_model(tmp_path / "base")
    tiny.write_rows(tmp_path / "train.jsonl", tiny.rows(40))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    def block(text: str) -> str:
        assert text.count('"smollm2-135m"') <= 1
        capsys.readouterr()
        exec(compile(text.replace('"smollm2-135m"', repr(str(base))), str(PAGE), "exec"), names)
        return capsys.readouterr().out

    return block


def test_the_blocks_run_and_learn(run: Callable[[str], str]) -> None:
    by_hand, with_loop = BLOCKS
    told = run(by_hand)
    losses = {name: [float(x) for x in re.findall(rf"{name}: ([\d.]+)", told)] for name in ("sft", "focal")}
    for name, found in losses.items():
        assert len(found) == 20
        assert found[-1] < found[0]
        assert read_adapter(Path("adapters", name)).config.method == "lora"
    assert losses["focal"][0] < losses["sft"][0], "every token's loss is less by its factor (1 - p)^gamma"

    assert run(with_loop).startswith("finished best: ")
    records = [json.loads(line) for line in Path("runs/hardest/metrics.jsonl").read_text("utf-8").splitlines()]
    validations = [record["loss"] for record in records if record["kind"] == "eval"]
    assert min(validations) < validations[0]
    assert read_adapter(Path("runs/hardest/adapter")).config.method == "lora"


def test_a_loop_by_hand_is_short() -> None:
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) < 40
