"""`make quickstart`, on a base that is trained in a second."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run import tiny

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


@pytest.fixture
def quickstart(make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    test = tiny.write_rows(tmp_path / "test.jsonl", tiny.rows(12, first=60))
    evaluation = {"data": str(test), "max_rows": None}
    monkeypatch.setattr(script, "RECIPE", make_recipe(training={"max_steps": 2}, evaluation=evaluation))
    return script


def test_the_whole_way_asks_a_part_of_the_test_rows_and_says_how_sure_that_is(
    quickstart: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "MEASURED", 5)
    quickstart.main(str(tmp_path / "own"))
    said = capsys.readouterr().out
    assert said.startswith("1/4  training")
    at = [said.index(f"{number}/4  ") for number in range(1, 5)]
    assert at == sorted(at)
    assert json.loads((tmp_path / "own" / "evaluation.json").read_text("utf-8"))["rows"] == 5
    assert "measuring on 5 tickets" in said
    exact = next(line for line in said.splitlines() if line.strip().startswith("exact match"))
    assert exact.split()[2:4] == ["0.0%", "0.0%"]
    assert exact.endswith("± 0.0%")
    assert " s in all\n" in said[at[3] :]
    assert f"chat {tmp_path / 'own'}" in said[at[3] :]


def test_the_standard_error_of_a_share(quickstart: Any, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.print_shares("exact match", 0.0, 0.5, 100)
    assert capsys.readouterr().out.split()[-3:] == ["50.0%", "±", "5.0%"]


def test_what_is_measured_is_less_than_there_is(quickstart: Any) -> None:
    rows = (SCRIPT.parent / "support" / "test.jsonl").read_text("utf-8").splitlines()
    assert 0 < quickstart.MEASURED <= len(rows) / 3
