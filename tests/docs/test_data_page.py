"""docs/data.md: its files and recipes, one after the other as they stand there, learn what stands below them."""

import json
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.family_tokenizers import build_tokenizer
from topwork.common.errors import DataError
from topwork.data.config import DataConfig, SourceConfig
from topwork.data.examples import Example, load_data
from topwork.data.files.rows import Row
from topwork.data.preferences.reading import recognise_preferences
from topwork.data.preferences.shapes import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")


@dataclass(frozen=True)
class Recipe:
    """A recipe of the page, the files that stand above it, and what is said to come of it: (how it is told, text)."""

    heading: str
    text: str
    family: str
    files: dict[str, str]
    told: list[tuple[str, str]]


def recipes() -> list[Recipe]:
    found: list[Recipe] = []
    files: dict[str, str] = {}
    heading = ""
    for title, kind, rest, text in re.findall(r"^##+ ([^\n]*)$|^```(\w+) ?(\S*)\n(.*?)^```$", PAGE, re.M | re.S):
        heading = title or heading
        if kind == "yaml":
            found.append(Recipe(heading, text, rest or "smollm2", dict(files), []))
        elif kind == "text":
            found[-1].told.append((rest, text.rstrip("\n")))
        elif kind and kind != "python":
            files[rest] = text
    return found


RECIPES = recipes()


def shown(tokenizer: Any, example: Example) -> str:
    """The text, in [[ ]] what is learned of it."""
    runs = groupby(zip(example.tokens.tolist(), example.weights.tolist()), lambda pair: bool(pair[1]))
    told = ((learned, tokenizer.decode([token for token, _ in run])) for learned, run in runs)
    return "".join(f"[[{text}]]" if learned else text for learned, text in told)


def test_the_page_has_recipes() -> None:
    assert len(RECIPES) > 15
    assert {how for recipe in RECIPES for how, _ in recipe.told} == {"learned", "log", "refused"}


@pytest.mark.parametrize("recipe", RECIPES, ids=[f"{at} {recipe.heading}" for at, recipe in enumerate(RECIPES)])
def test_a_recipe_learns_what_stands_below_it(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in recipe.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    monkeypatch.chdir(tmp_path)
    options = yaml.safe_load(recipe.text)["data"]
    tokenizer = build_tokenizer(recipe.family)
    if recipe.family == "smollm2":
        options = {"chat_template": "chatml", **options}
    lines: list[str] = []
    refused = next((text for how, text in recipe.told if how == "refused"), None)
    if refused is not None:
        with pytest.raises(DataError) as error:
            load_data(DataConfig(**options), tokenizer, 512, 0, lines.append)
        assert " ".join(refused.split()) in " ".join(str(error.value).split())
        return
    data = load_data(DataConfig(**options), tokenizer, 512, 0, lines.append)
    for how, text in recipe.told:
        if how == "log":
            assert [line for line in text.splitlines() if not any(line in told for told in lines)] == [], lines
        else:
            expected = text.split("\n---\n")
            assert [shown(tokenizer, data.train[at]) for at in range(len(expected))] == expected


ROWS = re.findall(r"^\| `(\w+)` \| `(\{.*?\})` \|", PAGE, re.M)


def test_every_format_has_a_row() -> None:
    names = set(DataConfig.model_fields["format"].annotation.__args__)  # type: ignore[union-attr]
    assert {name for name, _ in ROWS} == names - {"auto"}


@pytest.mark.parametrize(("name", "text"), ROWS)
def test_a_row_of_the_table_is_recognised(name: str, text: str, tmp_path: Path) -> None:
    fields = json.loads(text)
    if name in KINDS:
        recognised = recognise_preferences([Row(fields, "a")], DataConfig(train="a", format=name))  # type: ignore[arg-type]
        assert recognised.kind == name
        return
    path = tmp_path / "rows.jsonl"
    path.write_text(text + "\n", "utf-8")
    tokenizer, lines = build_tokenizer("smollm2"), list[str]()
    (example,) = load_data(DataConfig(train=str(path), chat_template="chatml"), tokenizer, 512, 0, lines.append).train
    assert lines[0].startswith(f"read as {name}: ")
    assert "our.<|im_end|>]]" in shown(tokenizer, example)


def test_the_python_block_reads_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text(RECIPES[-1].files["pairs.jsonl"], "utf-8")
    names: dict[str, Any] = {"tokenizer": build_tokenizer("llama3")}
    exec(compile(block, "docs/data.md", "exec"), names)
    assert (names["chosen"].columns["chosen"][0], names["rejected"].columns["chosen"][0]) == (1.0, -1.0)


def test_every_option_that_is_named_exists_and_none_is_left_out() -> None:
    known = {*DataConfig.model_fields, *SourceConfig.model_fields}
    assert set(re.findall(r"`data\.(\w+)", PAGE)) <= known
    assert {name for name in DataConfig.model_fields if f"`{name}" not in PAGE and f"data.{name}" not in PAGE} == set()
