"""docs/arms.md: its configuration is one, and its votes are votes."""

import json
import re
from pathlib import Path

from topwork.recipe.recipe import parse_yaml
from topwork.serving.settings import make_config
from topwork.serving.votes import Vote

PAGE = (Path(__file__).parents[2] / "docs" / "arms.md").read_text("utf-8")


def test_the_configuration_is_one() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    config = make_config(parse_yaml(text, "docs/arms.md"), "docs/arms.md")
    assert [arm.weight for arm in config.routes[0].arms] == [9, 1]
    assert [tenant.name for tenant in config.tenants] == ["shop", "ops"]


def test_the_votes_are_votes() -> None:
    bodies = re.findall(r"^\| `(\{.*?\})` \|", PAGE, re.M)
    assert len(bodies) == 4
    for number, body in enumerate(bodies):  # the dots stand for two ids in each
        ids = iter(f"{number}{place}" for place in range(2))
        Vote.model_validate(json.loads(re.sub("…", lambda _, ids=ids: next(ids), body)))
