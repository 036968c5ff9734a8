"""What the README tells people to type exists: commands, options, Python names, make targets."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer

import topwork
from topwork.cli.app import app
from topwork.recipe.recipe import make_recipe, parse_yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
FENCES = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.partition("  #")[0].strip()
    for _, text in FENCES
    for line in text.splitlines()
    if line.startswith(("topwork ", "make "))
]


def test_the_readme_shows_commands() -> None:
    assert {"make quickstart", "make test"} <= set(COMMANDS)
    assert len([command for command in COMMANDS if command.startswith("topwork ")]) >= 5


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("topwork ")])
def test_a_command_parses(command: str) -> None:
    verb, *arguments = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    found = group.commands[verb]  # type: ignore[attr-defined]
    with found.make_context(verb, arguments) as context:
        assert not context.args


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_a_make_target_exists(command: str) -> None:
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


def test_the_recipe_shown_is_a_recipe() -> None:
    (shown,) = [text for language, text in FENCES if language == "yaml"]
    make_recipe(parse_yaml(shown, "README"))


def test_python_calls_fit_the_functions_in_under_ten_lines() -> None:
    (shown,) = [text for language, text in FENCES if language == "python"]
    assert len([line for line in shown.splitlines() if line.strip()]) < 10
    calls = [
        node
        for node in ast.walk(ast.parse(shown))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "topwork"
    ]
    assert calls
    for call in calls:
        function = getattr(topwork, call.func.attr)  # type: ignore[attr-defined]
        keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
        inspect.signature(function).bind(*call.args, **keywords)


def test_every_public_name_can_be_imported() -> None:
    for name in topwork.__all__:
        assert getattr(topwork, name) is not None
    with pytest.raises(AttributeError, match="it has"):
        _ = topwork.nonsense
