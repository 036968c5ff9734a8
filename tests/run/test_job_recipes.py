"""The recipes that ship for the usual jobs: what they learn of their example rows, how they train, the command."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.family_tokenizers import build_tokenizer
from data.learned_text import shown
from run import tiny
from run.fixtures import Said
from topwork.data.chat.template import Encoded
from topwork.data.examples import load_data
from topwork.recipe.recipe import Recipe, load_recipe
from topwork.run.recipes import copy_recipe, shipped_recipe, shipped_recipes
from topwork.run.train import train, train_together

Command = Callable[..., Said]
NAMES = [each.name for each in shipped_recipes()]
QUANTIZED = "qlora-small-card"

TEMPLATES = {"smollm2": "smollm2", "Qwen/Qwen2.5": "qwen2_5", "Qwen/Qwen3": "qwen3"}
CALL = (
    '<tool_call>\n{"name": "find_room", "arguments": {"day": "2026-03-10", "time": "10:00", "people": 6}}\n</tool_call>'
)
FIRST = {
    # name: what is learned of its first row
    "classification": ["fault"],
    "extraction": [
        '{"name": "Okafor", "guests": 4, "day": "Friday", "time": "19:00", "wishes": "no gluten"}',
    ],
    "chat-style": [
        "Likely not. Curled but green usually means heat or uneven watering. Water in the morning, at the root, and "
        "look again in four days. Are there spots on them too?",
        "Good, then it is the heat. Give them shade from noon to three and they will flatten out.",
    ],
    "tool-calls": [CALL, "Yes: Oak and Elm are free tomorrow at ten."],
    "reasoning": [
        "<think>\nTwo trips cost 6, three cost 9. 9 is more than 8, 6 is less.\n</think>\n\nFrom three trips on."
    ],
}
FIRST[QUANTIZED] = FIRST["chat-style"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base whose template has a place for everything: system messages, tools, thinking."""
    folder = tiny.write_model(tmp_path_factory.mktemp("base") / "qwen", family="qwen3")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}), "utf-8")
    return folder


@pytest.fixture(scope="module")
def copied(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """copied(name): the recipe as it is shipped, but for the base, its type and where its run goes."""
    folder = tmp_path_factory.mktemp("recipes")
    for name in NAMES:
        copy_recipe(name, folder / f"{name}.yaml", overwrite=True)  # two share their example rows

    def load(name: str, *overrides: str) -> Recipe:
        base = [f"model.model_name_or_path={qwen}", "model.dtype=float32", f"output_dir={folder / 'runs' / name}"]
        return load_recipe(folder / f"{name}.yaml", [*base, *overrides])

    return load


def learned(name: str, folder: Path) -> list[tuple[str, list[str]]]:
    """(all of it, what is learned of it) of each sequence of all rows, by the template of the recipe's own model. A
    letter is a token here, so that none may be too long."""
    recipe = load_recipe(copy_recipe(name, folder)[0])
    family = next(own for model, own in TEMPLATES.items() if recipe.model.model_name_or_path.startswith(model))
    config = recipe.data.model_copy(update={"eval_fraction": 0.0, "max_length": 1 << 20})
    data = load_data(config, build_tokenizer(family), 1 << 20, 0, lambda _: None)
    texts = [shown(data.template, Encoded(list(each.tokens), list(each.weights))) for each in data.train]
    return [(text, [part.split("⟧")[0] for part in text.split("⟦")[1:]]) for text in texts]


def test_there_is_one_for_each_usual_job() -> None:
    assert {*FIRST, "continued-pretraining"} == set(NAMES)
    assert all(each.job.endswith(".") and len(each.job) < 120 for each in shipped_recipes())


@pytest.mark.parametrize("name", sorted(FIRST))
def test_answers_and_their_ends_are_learned_and_questions_are_not(name: str, tmp_path: Path) -> None:
    found = learned(name, tmp_path)
    first = [part for _, parts in found for part in parts][: len(FIRST[name])]
    assert first == [f"{text}<|im_end|>" for text in FIRST[name]]
    assert len(found) >= len(shipped_recipe(name).rows.splitlines())
    for text, parts in found:
        assert parts
        assert all(part.endswith("<|im_end|>") for part in parts)
        assert "<|im_start|>user" in text
        assert not any("<|im_start|>" in part for part in parts)


def test_all_of_a_plain_text_and_its_end_are_learned(tmp_path: Path) -> None:
    found = learned("continued-pretraining", tmp_path)
    assert len(found) == 12  # paragraphs
    for text, parts in found:
        assert len(text.split("⟦")[0]) < 3  # its first token, which follows nothing
        assert parts[0].endswith(".<|im_end|>")


def test_all_train(copied: Callable[..., Recipe]) -> None:
    """Together over one base, but for the one over a base in 4 bits."""
    changes = (
        "training.max_steps=2",
        "training.batch_size=4",
        "data.too_long=truncate",
        "training.tokens_per_pass=4096",
    )
    recipes = [copied(name, *changes) for name in NAMES if name != QUANTIZED]
    runs = train_together(recipes, log=lambda _: None)
    runs.append(train(copied(QUANTIZED, *changes), log=lambda _: None))
    for run in runs:
        assert run.result["steps"] == 2
        assert run.result["last_loss"] < run.result["first_loss"] * 1.5


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_why_of_its_settings(name: str) -> None:
    shipped = shipped_recipe(name)
    assert "# Rows: " in shipped.text
    assert shipped.text.count("  # ") >= 5
    load_recipe(copy_source(name))
    assert shipped.text.rstrip().endswith(f"output_dir: runs/{name}")


def copy_source(name: str) -> Path:
    return Path(sys.modules["topwork"].__file__ or "").parent / "recipes" / f"{name}.yaml"


# The command


def test_the_list_and_one_of_them(topwork: Command) -> None:
    listed = topwork("recipes")
    assert listed.code == 0
    assert [line.split()[0] for line in listed.out.splitlines()[: len(NAMES)]] == NAMES
    one = topwork("recipes", "extraction")
    assert one.out.rstrip("\n") == shipped_recipe("extraction").text.rstrip("\n")
    rows = topwork("recipes", "extraction", "--rows").out.splitlines()
    assert [set(json.loads(row)) for row in rows] == [{"messages"}] * 12


def test_json(topwork: Command, tmp_path: Path) -> None:
    found = json.loads(topwork("recipes", "--json").out)
    assert [each["name"] for each in found] == NAMES
    assert set(found[0]) == {"name", "job", "model", "recipe", "rows_file", "rows"}
    written = json.loads(topwork("recipes", "reasoning", "--out", tmp_path, "--json").out)["written"]
    assert written == [str(tmp_path / "reasoning.yaml"), str(tmp_path / "reasoning.jsonl")]


def test_a_copy_is_ready_to_be_used_and_never_lost(topwork: Command, tmp_path: Path) -> None:
    said = topwork("recipes", "classification", "--out", tmp_path / "my labels" / "labels.yaml")
    assert said.code == 0
    path = tmp_path / "my labels" / "labels.yaml"
    assert f"next: topwork lint '{path}'" in said.out
    assert Path(str(load_recipe(path).data.train)) == tmp_path / "my labels" / "classification.jsonl"
    path.write_text("mine")
    again = topwork("recipes", "classification", "--out", path)
    assert again.code == 2
    assert f"{path} is there already" in again.err
    assert path.read_text() == "mine"
    path.unlink()
    assert topwork("recipes", "classification", "--out", path).code == 2  # its rows are there
    assert topwork("recipes", "classification", "--out", path, "--overwrite").code == 0


def test_what_is_no_recipe(topwork: Command, tmp_path: Path) -> None:
    said = topwork("recipes", "clasification")
    assert said.code == 2
    assert "did you mean 'classification'" in said.err
    assert "topwork init MODEL DATA" in said.err
    assert topwork("recipes", "--out", tmp_path).code == 2


def test_torch_is_not_imported() -> None:
    code = "import sys; from topwork.cli.app import main; sys.argv = ['topwork', 'recipes']\ntry: main()\nexcept SystemExit: pass\nprint({'torch', 'transformers', 'datasets'} & set(sys.modules))"  # noqa: E501
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
