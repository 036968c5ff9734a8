"""Every recipe that is shipped loads, and the files it names are there."""

from pathlib import Path

import pytest

from topwork.models.source import ALIASES, HUB_ID
from topwork.recipe.recipe import load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted(path for path in EXAMPLES.rglob("*.y*ml"))


def test_there_are_examples() -> None:
    assert EXAMPLES / "support" / "recipe.yaml" in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_an_example_loads_and_its_files_exist(path: Path) -> None:
    recipe = load_recipe(path)
    for name in (recipe.data.train, recipe.data.eval, recipe.evaluation.data):
        assert name is None or Path(name).is_file(), f"{path} names {name}"
    template = recipe.data.chat_template
    assert template in (None, "chatml", "plain") or Path(str(template)).is_file()
    model = recipe.model.model_name_or_path
    assert model in ALIASES or Path(model).exists() or HUB_ID.fullmatch(model)
    assert not Path(recipe.output_dir).is_absolute()
