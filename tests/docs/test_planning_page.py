"""docs/planning.md: its tables are what the code says, and its commands run as they stand there."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from run.fixtures import Said, topwork

__all__ = ["topwork"]
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "planning.md").read_text("utf-8")


def test_the_tables_are_current(tool: Callable[[str], ModuleType]) -> None:
    made: Any = tool("planning_tables")
    assert made.page(PAGE) == PAGE, "docs/planning.md is old; run `make docs`"


def test_the_commands_run(topwork: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^topwork (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        said = topwork(*shlex.split(command))
        assert said.code == 0, f"{command}\n{said.err}"


def test_counts_that_people_know_stand_in_the_table() -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith("| llama-3-8b | 8.03 B"))
    assert row.split(" | ")[3:9:3] == ["6.8 M", "13.6 M"]
    assert row.split(" | ")[9] == "41.9 M"
