"""`topwork advise`: the answer first, then each choice; a recipe, a prompt, a skill; and what is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from run import tiny
from run.fixtures import Said
from topwork.plan.advice.pages import prompt
from topwork.recipe.recipe import load_recipe
from topwork.run.advise import Request, advise

Command = Callable[..., Said]
ASKED = ("--task", "classification", "--examples", 5000, "--model", "llama-3.2-1b", "--memory", "24GB")


def test_the_answer_stands_first_and_every_choice_has_its_reason_and_its_sources(topwork: Command) -> None:
    said = topwork("advise", *ASKED)
    assert said.code == 0
    lines = said.out.splitlines()
    assert lines[0] == "Fine-tune."
    assert "  base: llama-3.2-1b, 1,235,814,400 parameters, width 2,048" in lines
    assert "  training.learning_rate: 0.00049" in lines
    assert "  adapter.target_modules: all-linear" in lines
    assert lines.index("Sources:") > lines.index("  training.learning_rate: 0.00049")


def test_json_has_every_choice_with_its_rule_reason_and_sources(topwork: Command) -> None:
    found = json.loads(topwork("advise", *ASKED, "--json").out)
    assert found["answer"] == "fine-tune"
    assert found["recipe"]["model"]["model_name_or_path"] == "llama-3.2-1b"
    choices = {choice["key"]: choice for choice in found["choices"]}
    assert choices["training.learning_rate"]["rule"] == "rate-by-the-width"
    for choice in found["choices"]:
        assert choice["reason"]
        assert all(source["how"] and source["date"] for source in choice["sources"])


def test_prompting_comes_first_where_examples_are_few_and_a_recipe_is_told_for_later(topwork: Command) -> None:
    out = topwork("advise", "--task", "extraction", "--examples", 12).out
    assert out.startswith("Prompt first.")
    assert "If you fine-tune nevertheless, the recipe:" in out


def test_a_recipe_is_written_with_reasons_and_never_over_another(
    topwork: Command, tickets: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "my recipe.yaml"
    given = ("--data", tickets, "--model", tiny_llama, "--set", "adapter.r=4", "--set", "output_dir=runs/mine")
    said = topwork("advise", *given, "--out", out)
    assert said.code == 0
    assert f"go on with: topwork train '{out}'" in said.out
    recipe = load_recipe(out)
    assert recipe.adapter.r == 4
    assert recipe.output_dir == "runs/mine"
    assert recipe.data.train == str(tickets)
    text = out.read_text("utf-8")
    assert "# Advised for: task: extraction (every answer is a JSON object; --task says otherwise)" in text
    lines = text.splitlines()
    assert lines[lines.index("  lora_alpha: 32") - 1].startswith("  # ")
    assert not lines[lines.index("  r: 4") - 1].startswith("  #")  # that was not advised
    again = topwork("advise", *given, "--out", out)
    assert again.code == 2
    assert f"{out} is there; name another file" in again.err
    assert out.read_text("utf-8") == text


def test_a_recipe_is_compared_line_by_line(make_recipe: Callable[..., Path], topwork: Command) -> None:
    training = {"learning_rate": 1e-5, "max_steps": 300, "batch_size": 4, "warmup_steps": None, "warmup_ratio": 0.03}
    path = make_recipe(training=training, adapter={"r": 8, "lora_alpha": 8, "lora_dropout": 0.0})
    said = topwork("advise", path, "--json")
    differences = {each["key"]: (each["given"], each["advised"]) for each in json.loads(said.out)["differences"]}
    assert differences["training.learning_rate"] == (1e-5, 0.013)  # the tiny base has a width of 32
    assert differences["adapter.lora_alpha"] == (8.0, 32)
    for same in (
        "adapter.r",
        "adapter.target_modules",
        "training.batch_size",
        "training.warmup_ratio",
        "data.too_long",
    ):
        assert same not in differences
    assert "training.num_train_epochs" not in differences  # max_steps goes before it
    out = topwork("advise", path).out
    assert "  training.learning_rate: 1e-05 -> 0.013" in out
    assert "  adapter.r:" not in out


def test_a_recipe_as_advised_differs_in_nothing(tickets: Path, tiny_llama: Path, tmp_path: Path) -> None:
    request = Request(train=str(tickets), model=str(tiny_llama), memory="8GB")
    advise(None, (), request).write(tmp_path / "recipe.yaml")
    found = advise(tmp_path / "recipe.yaml", (), Request(memory="8GB"))
    assert found.differences == ()
    assert "0 of" in found.as_text()


def test_what_is_set_over_a_recipe_stands(make_recipe: Callable[..., Path]) -> None:
    found = advise(make_recipe(), ["training.max_steps=50", "adapter.r=2"])
    assert found.advice.value("adapter.r") is None
    assert found.advice.steps == 50
    assert {"decided: training.max_steps = 50", "decided: adapter.r = 2"} <= set(found.told)


@pytest.mark.parametrize(
    ("key", "same", "other"),
    [
        ("training.learning_rate", 0.018, 0.021), ("training.warmup_ratio", 0.05, 0.1), ("training.batch_size", 2, 5),
        ("data.max_length", 512, 130), ("data.eval_fraction", 0.11, 0.05), ("data.too_long", "refuse", "truncate"),
        ("evaluation.grader", "auto", "exact_match"),
    ],
)  # fmt: skip
def test_what_is_as_good_is_no_difference(
    key: str, same: Any, other: Any, make_recipe: Callable[..., Path], topwork: Command
) -> None:
    """The advice for forty rows of a base 32 wide: 0.013, 0.03, 4, 192, 0.2, middle, auto."""
    section, _, name = key.partition(".")
    for value, differs in ((same, False), (other, True)):
        fixed = {"max_steps": 300, "warmup_steps": None, "warmup_ratio": 0.03}
        changes = {section: {name: value}, "training": fixed | ({name: value} if section == "training" else {})}
        found = advise(make_recipe(**changes))
        assert found.differences is not None
        assert (key in [each.key for each in found.differences]) is differs, (key, value)


def test_another_method_is_told_once(make_recipe: Callable[..., Path]) -> None:
    found = advise(make_recipe(adapter={"method": "ia3", "r": 16, "lora_alpha": 32, "lora_dropout": 0.0}))
    assert found.differences is not None
    assert [each.key for each in found.differences if each.key.startswith("adapter")] == ["adapter.method"]


def test_a_prompt_and_a_skill(topwork: Command, tmp_path: Path) -> None:
    assert topwork("advise", "--prompt").out == prompt() + "\n"
    said = topwork("advise", "--skill", tmp_path / "skill")
    assert said.out.split() == [str(tmp_path / "skill" / name) for name in ("SKILL.md", "references/rules.md")]
    assert yaml.safe_load((tmp_path / "skill" / "SKILL.md").read_text("utf-8").split("---")[1])["name"]
    before = tiny.folder_bytes(tmp_path)
    again = topwork("advise", "--skill", tmp_path / "skill")
    assert again.code == 2
    assert "SKILL.md is there" in again.err
    assert tiny.folder_bytes(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no terminal to ask on: give a recipe, --data FILE, or --task and --examples"),
        (("--task", "clasification"), "there is no task 'clasification'"),
        (("--task", "classification", "--examples", "-5"), "examples: -5 cannot be; expected at least 0"),
        (("--task", "classification", "--goal", "citation"), "did you mean 'citations'"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("--task", "reasoning", "--memory", "lots"), "--memory is 'lots'; expected a size"),
        (("--task", "reasoning", "--memory", "-1GB"), "--memory is '-1GB'; expected a size"),
        (("--task", "reasoning", "--device", "RTX 4O90"), "there is no device 'RTX 4O90'"),
        (("--task", "reasoning", "--device", "T4", "--memory", "9GB"), "give one of them"),
        (("--task", "reasoning", "--model", "lama-3-8b"), "there is no model 'lama-3-8b'"),
        (("--task", "reasoning", "--set", "adapter.rank=3"), "adapter.r"),
        (
            ("--task", "reasoning", "--tokens", "500", "--longest", "20"),
            "--longest is 20, which is less than the mean",
        ),
        (("--examples", "5"), "nothing to advise on"),
        (("nowhere.yaml",), "nowhere.yaml cannot be read"),
    ],
)
def test_requests_that_cannot_be_are_refused(
    arguments: tuple[str, ...], message: str, topwork: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = topwork("advise", *arguments)
    assert said.code == 2, said
    assert message in said.err
    assert not list(tmp_path.iterdir())


def test_a_recipe_names_its_own_base(make_recipe: Callable[..., Path], topwork: Command) -> None:
    said = topwork("advise", make_recipe(), "--model", "llama-3-8b")
    assert said.code == 2
    assert "model: the recipe names its own" in said.err


def test_a_terminal_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from topwork.cli import advise as command

    answers = iter(["", "classification", 700, "llama-3.2-1b", "", "latency, cost"])
    monkeypatch.setattr(command.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(command.typer, "prompt", lambda *_, **__: next(answers))
    asked = command._asked()
    assert (asked.task, asked.examples, asked.model, asked.memory) == ("classification", 700, "llama-3.2-1b", None)
    assert asked.goals == ("latency", "cost")


def test_the_table_needs_no_torch() -> None:
    code = "import sys, topwork.plan.advice.advise, topwork.plan.advice.pages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
