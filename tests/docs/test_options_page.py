"""docs/options.md says what the typed options say, and leaves none out."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from pydantic.fields import FieldInfo

from topwork.recipe.recipe import all_keys
from topwork.serving.config import ServeConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def options_page(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("options_page")


def test_the_page_is_current(options_page: ModuleType) -> None:
    assert options_page.PAGE.read_text("utf-8") == options_page.page(), "docs/options.md is old; run `make docs`"
    assert options_page.SERVING_PAGE.read_text("utf-8") == options_page.serving_page(), "docs/serving-options.md is old"


def test_every_option_has_a_docstring(options_page: ModuleType) -> None:
    def options(path: str, field: FieldInfo) -> Iterator[tuple[str, FieldInfo]]:
        for kind in options_page.models(field.annotation):
            for name, inner in kind.model_fields.items():
                yield f"{path}.{name} of {kind.__name__}", inner
                yield from options(f"{path}.{name}", inner)

    sections = {**options_page.SECTIONS, **ServeConfig.model_fields}
    found = [one for name, field in sections.items() for one in options(name, field)]
    assert {"routes.arms.weight of ArmConfig", "limits.body_bytes of LimitsConfig"} <= {at for at, _ in found}
    assert {"sweep.halving.factor of Halving", "adapter.num_virtual_tokens of PrefixConfig"} <= {at for at, _ in found}
    assert [at for at, field in found if not field.description] == []


def test_every_key_of_a_recipe_stands_in_its_section(options_page: ModuleType) -> None:
    text = options_page.page()
    sections = {part.partition("`")[0]: part for part in text.split("\n## `")[1:]}
    for section, _, key in (name.partition(".") for name in all_keys()):
        assert f"| `{key}` |" in sections[section] if key else f"| `{section}` |" in text, (section, key)


def test_types_are_told_in_words(options_page: ModuleType) -> None:
    lines = options_page.page().splitlines()  # of options that several methods have by one name the first, LoRA's
    told = {line.split(" | ")[0]: line for line in reversed(lines) if line.startswith("| `")}
    assert "| whole number, at least 1 | `16` |" in told["| `r`"]
    assert "| text, or a list of texts | `all-linear` |" in told["| `target_modules`"]
    assert "| `auto` · `off` · `full`, or whole number | `auto` |" in told["| `activation_checkpointing`"]
    assert "| number, at least 0, less than 1 | `0.0` |" in told["| `lora_dropout`"]
    assert "| prefix, prompt | whole number" in told["| `num_virtual_tokens`"]


def test_the_tool_does_without_torch() -> None:
    code = "import sys, options_page; options_page.page(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
