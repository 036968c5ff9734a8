"""The indexes of decisions and records list every file, and what stands in them."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def index_pages(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("index_pages")


def linked(folder: Path) -> list[str]:
    """The files of the same folder that its index links, row by row."""
    rows = [line for line in (folder / "README.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    return [target for row in rows for target in re.findall(r"\]\(([^)/]+)\)", row)]


@pytest.mark.parametrize("page", ["decisions", "records"])
def test_the_index_is_current(index_pages: ModuleType, page: str) -> None:
    folder = {"decisions": index_pages.DECISIONS, "records": index_pages.RECORDS}[page]
    assert (folder / "README.md").read_text("utf-8") == getattr(index_pages, page)(), "it is old; run `make docs`"


@pytest.mark.parametrize("folder", ["docs/decisions", "benchmarks/results"])
def test_every_file_is_listed(folder: str) -> None:
    files = {file.name for file in (ROOT / folder).iterdir()} - {"README.md"}
    assert files == set(linked(ROOT / folder))


def test_decisions_are_numbered_through(index_pages: ModuleType) -> None:
    numbers = [int(file.name[:4]) for file in sorted(index_pages.DECISIONS.glob("[0-9]*.md"))]
    assert numbers == [*range(1, len(numbers) + 1)]
    told = re.findall(r"^\| (\d+) \|", index_pages.decisions(), re.MULTILINE)
    assert [int(number) for number in told] == numbers


def test_a_record_is_made_by_a_script_with_these_options(index_pages: ModuleType) -> None:
    """Every script knows the options that the index says it was called with."""
    for command in sorted(set(index_pages.COMMANDS.values())):
        script, *options = command.split()
        if script == "topwork":
            continue
        source = (ROOT / "benchmarks" / script).read_text("utf-8")
        for option in (word for word in options if word.startswith("--")):
            assert f'"{option}"' in source, f"{script} has no {option}"
