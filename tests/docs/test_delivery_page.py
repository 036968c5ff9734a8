"""docs/delivery.md: its commands run as they stand there, one after the other, on runs of a tiny base; its tables say
what the code says."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from run import tiny
from run.fixtures import Said, topwork
from topwork.merging import threshold
from topwork.merging.combine.table import WAYS
from topwork.run.train import train

__all__ = ["topwork"]
PAGE = (Path(__file__).parents[2] / "docs" / "delivery.md").read_text("utf-8")
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line.strip()
]
BASE = "somebody/tiny-llama"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page has at hand: two runs, an adapter of another's, and its base."""
    base = tiny.write_model(tmp_path / "models" / "base", num_hidden_layers=1)
    for name, first in (("support", 0), ("terse", 40)):
        rows = tiny.write_rows(tmp_path / f"{name}.jsonl", tiny.rows(12, first))
        training = {"learning_rate": 0.02, "max_steps": 2, "eval_steps": 2}
        values = tiny.recipe_values(base, rows, tmp_path / "runs" / name, training=training)
        train(tiny.write_recipe(tmp_path / f"{name}.yaml", values), log=lambda _: None)
    shutil.copytree(tmp_path / "runs" / "terse" / "adapter", tmp_path / "adapters" / "other")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run(place: Path, topwork: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(COMMANDS) > 12
    for command in COMMANDS:
        name, *arguments = shlex.split(command)
        assert name == "topwork", command
        local = ["--base-name", BASE] if arguments[0] == "push" and "merged" not in command else []
        said = topwork(*arguments, *local)
        assert said.code == 0, f"{command}\n{said.err}"
    block = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    exec(compile(block.replace('dry_run="', f'base_name="{BASE}", dry_run="'), "docs/delivery.md", "exec"), {})
    for folder, record in RECORDS.items():
        assert json.loads((place / folder / record).read_text("utf-8")), folder
        assert "---\nlibrary_name" in (place / folder / "README.md").read_text("utf-8"), folder


RECORDS = {
    "merged/support": "merge.json", "combined/both": "combine.json", "exported/vllm": "export.json",
    "to-be-pushed": "adapter_config.json", "to-be-pushed-merged": "merge.json",
}  # fmt: skip


def test_the_table_of_readers_is_current(tool: Callable[[str], ModuleType]) -> None:
    made: Any = tool("delivery_table")
    assert made.page() == PAGE, "docs/delivery.md is old; run `make docs`"


def test_every_method_stands_in_the_table() -> None:
    table = PAGE.partition("| method |")[2].partition("\n\n")[0]
    rows = {line.split(" | ")[0].strip("| `"): line.split(" | ")[2] for line in table.splitlines()[2:]}
    assert set(rows) == set(WAYS)
    assert {name for name, told in rows.items() if told == "truncated"} == {
        name for name, way in WAYS.items() if way.entrywise is not None
    }


def test_thresholds_are_those_of_the_check() -> None:
    told = " ".join(PAGE.partition("**The check.**")[2].partition("\n\n")[0].split())
    fp32 = f"{threshold.LARGEST_FP32_DIFFERENCE:.0e} of the largest logit or a KL over {threshold.LARGEST_FP32_KL:.0e}"
    assert fp32.replace("e-0", "e-") in told
    assert f"a KL over {threshold.FLOOR_16BIT_KL} that is also over {threshold.LARGEST_16BIT_KL}, or over half" in told
    assert threshold.LARGEST_SHARE == 0.5
    assert f"under {threshold.LEAST_16BIT_AGREEMENT * 100:.0f} %" in told
