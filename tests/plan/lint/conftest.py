"""Lint on rows that a test makes: clean ones, with something planted."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from data.family_tokenizers import build_tokenizer
from plan.lint.linted import CONTEXT, Linted, clean_rows
from topwork.plan.lint.examine import examine
from topwork.plan.lint.examined import Examined
from topwork.recipe.recipe import make_recipe


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Examined]:
    """read(changes, …): the clean rows, those of numbers (from 0) in `changes` put in their place, examined.

    `eval` and `test` are rows of their own; other names are options of `data`, `recipe` those of other sections.
    """

    def written(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(path)

    def of(
        changes: Mapping[int, Any] | Sequence[Any] = {}, *, eval: Any = None, test: Any = None, tokenizer: Any = None,
        recipe: Mapping[str, Any] = {}, trainable: int | None = None, count: int = 60, **data: Any,
    ) -> Examined:  # fmt: skip
        rows = clean_rows(count) if isinstance(changes, Mapping) else list(changes)
        for number, row in changes.items() if isinstance(changes, Mapping) else ():
            rows[number] = row
        values: dict[str, Any] = {
            "model": {"model_name_or_path": "none"},
            "data": {"train": written("train.jsonl", rows), "max_length": CONTEXT, **data},
            "training": {"batch_size": 4},
            **recipe,
        }
        if eval is not None:
            values["data"]["eval"] = written("valid.jsonl", eval)
        if test is not None:
            values["evaluation"] = {"data": written("test.jsonl", test)}
        return examine(make_recipe(values), tokenizer or build_tokenizer("smollm2"), CONTEXT, trainable)

    return of


@pytest.fixture
def lint(read: Callable[..., Examined]) -> Callable[..., Linted]:
    """lint(…): what the rules say of what `read` gives."""
    return lambda *arguments, **options: Linted(read(*arguments, **options))
