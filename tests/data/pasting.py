"""Advice as it stands in a message, pasted to the letter: into a recipe's file, and behind `--set` through a shell."""

import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from topwork.recipe.recipe import Recipe, load_recipe

_PRINTED = re.compile(r'data\.\w+: (?:\{(?:"(?:\\.|[^"\\])*"|[^"{}])*\}|"(?:\\.|[^"\\])*"|\w+)')
_HEAD = "model:\n  model_name_or_path: some/model\ndata:\n  train: rows.jsonl\n"


def printed(message: str) -> list[str]:
    """Every option of the message, letter by letter as it stands there."""
    return _PRINTED.findall(message)


def pasted(options: Sequence[str]) -> dict[str, Any]:
    """What the data options are where these are pasted, a line each; the same whichever way they are."""
    at_the_top = _loaded(_HEAD + "".join(f"{option}\n" for option in options))
    in_their_section = _loaded(_HEAD + "".join(f"  {option}\n" for option in options))
    typed = " ".join(f"--set {shlex.quote(option)}" for option in options)
    behind_set = _loaded(_HEAD, [word for word in shlex.split(typed) if word != "--set"])
    assert at_the_top == in_their_section == behind_set
    return {name: getattr(at_the_top.data, name) for name in map(_name, options)}


def _name(option: str) -> str:
    return option.removeprefix("data.").partition(":")[0]


def _loaded(text: str, overrides: Sequence[str] = ()) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text, "utf-8")
        return load_recipe(path, overrides)
