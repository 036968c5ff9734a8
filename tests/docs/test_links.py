"""What the pages point at exists: links, their headings, and the code they name."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    ROOT / "benchmarks" / "results" / "README.md",
]
HISTORY = {"log.md", "CHANGELOG.md"}
"""Pages that tell of code as it was."""
PLACES = (ROOT, ROOT / "src" / "topwork", ROOT / "benchmarks")


def heading_anchors(page: Path) -> set[str]:
    """As GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), target
        assert not anchor or anchor in heading_anchors(there), target


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: str(page.relative_to(ROOT))
)
def test_code_that_is_named_exists(page: Path) -> None:
    for path in re.findall(r"`([\w./-]+\.(?:py|c|yaml))", page.read_text("utf-8")):
        if "/" in path:
            assert any((place / path).exists() for place in PLACES), f"{page.name} names {path}"
