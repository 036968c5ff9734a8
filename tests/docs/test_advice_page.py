"""docs/advice.md is the table of rules; the prompt and the skill are the same table."""

from collections.abc import Callable
from types import ModuleType

import pytest
import yaml

from topwork.plan.advice.facts import GOALS, TASKS
from topwork.plan.advice.pages import prompt, skill_files
from topwork.plan.advice.table import RULES, SECTIONS


@pytest.fixture
def advice_page(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("advice_page")


def test_the_page_is_current(advice_page: ModuleType) -> None:
    assert advice_page.PAGE.read_text("utf-8") == advice_page.page(), "it is old; run `make docs`"


def test_sections_hold_every_rule_once() -> None:
    assert [rule for section in SECTIONS.values() for rule in section] == list(RULES)


@pytest.mark.parametrize("where", ["page", "prompt", "skill"])
def test_every_rule_its_reason_and_its_sources_are_told(where: str, advice_page: ModuleType) -> None:
    text = {"page": advice_page.page(), "prompt": prompt(), "skill": skill_files()["references/rules.md"]}[where]
    for rule in RULES:
        told = text.partition(f"**{rule.name}**")[2].partition("- **")[0]
        assert rule.why in told
        assert rule.when in told
        assert rule.what in told
        for source in rule.sources:
            assert f"{source.text} ({source.how}, {source.date})" in told


def test_a_prompt_and_a_skill_say_what_may_be_asked() -> None:
    for text in (prompt(), skill_files()["SKILL.md"]):
        assert all(f"- `{name}`: {meaning}" in text for name, meaning in (*TASKS.items(), *GOALS.items()))


def test_a_skill_has_the_front_matter_that_agents_read() -> None:
    """A name of small letters and dashes, at most 64; a description of at most 1,024 letters (agentskills.io)."""
    files = skill_files()
    _, front, body = files["SKILL.md"].split("---\n", 2)
    read = yaml.safe_load(front)
    assert set(read) == {"name", "description"}
    assert read["name"].replace("-", "").isalpha()
    assert read["name"] == read["name"].lower()
    assert len(read["name"]) <= 64
    assert 0 < len(read["description"]) <= 1024
    assert "references/rules.md" in body
    assert "references/rules.md" in files
