"""docs/lint.md names every rule, and no other."""

import re
from pathlib import Path

from topwork.plan.lint.rules import RULES

PAGE = Path(__file__).parents[2] / "docs" / "lint.md"


def test_the_page_has_all_rules() -> None:
    table = PAGE.read_text("utf-8").partition("| rule |")[2].partition("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    named = [name for cell in first_cells for name in re.findall(r"`([a-z-]+)`", cell)]
    assert len(named) == len(set(named))
    assert set(named) == {name for rule in RULES for name in rule.names}
