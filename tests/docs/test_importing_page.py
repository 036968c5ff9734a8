"""docs/importing.md has a row for every key that `topwork import` knows."""

from collections.abc import Callable
from types import ModuleType

from topwork.run.importing.tools.table import TOOLS


def test_the_page_is_made_of_the_tables(tool: Callable[[str], ModuleType]) -> None:
    made = tool("importing_page")
    assert made.PAGE.read_text("utf-8") == made.page(), "docs/importing.md is old; run `make docs`"


def test_every_key_stands_on_the_page(tool: Callable[[str], ModuleType]) -> None:
    made = tool("importing_page")
    told = made.tables()
    keys = {key.theirs for each in TOOLS.values() for key in each.keys if not key.theirs.startswith(made.TWINS)}
    assert {key for key in keys if f"`{key}`" not in told} == set()
