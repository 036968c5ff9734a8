"""Whole runs with activation checkpointing write the same bytes as without."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import topwork.run.fit as fit
from run.tiny import folder_bytes
from topwork.common.errors import ModelError
from topwork.common.memory import Free
from topwork.recipe.recipe import load_recipe
from topwork.run.outcome import TrainedRun
from topwork.run.session import open_session
from topwork.run.train import train

Recipes = Callable[..., Path]


def told(recipe: Path, overrides: tuple[str, ...] = (), **options: Any) -> tuple[TrainedRun, str]:
    lines: list[str] = []
    return train(recipe, overrides, log=lines.append, **options), "\n".join(lines)


def test_the_same_adapter_whatever_is_kept(make_recipe: Recipes) -> None:
    """With dropout, and resumed with another choice."""
    options: dict[str, Any] = {"adapter": {"lora_dropout": 0.1}}
    off, said = told(make_recipe("off", **options), ("training.activation_checkpointing=off", "training.max_steps=6"))
    assert "activation checkpointing" not in said
    expected = folder_bytes(off.folder / "adapter")
    recipe = make_recipe("full", **options)
    full, said = told(recipe, ("training.activation_checkpointing=full", "training.max_steps=6"))
    assert "activation checkpointing: 2 of 2 layers" in said
    assert folder_bytes(full.folder / "adapter") == expected
    newest = max((full.folder / "checkpoints").iterdir())
    (newest / "state.json").unlink()  # torn: the run goes on from the one before
    again, said = told(recipe, ("training.activation_checkpointing=1", "training.max_steps=6"), resume=True)
    assert "going on from" in said
    assert "activation checkpointing: 1 of 2 layers" in said
    assert folder_bytes(again.folder / "adapter") == expected


def test_too_many_layers_are_refused_before_anything_is_written(make_recipe: Recipes, tmp_path: Path) -> None:
    recipe = make_recipe(training={"activation_checkpointing": 3})
    with pytest.raises(ModelError, match=r"activation_checkpointing is 3, and .* has 2 layers; give at most 2"):
        told(recipe)
    assert not (tmp_path / "run").exists()


def test_little_memory_is_told(make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topwork.run.train.refuse_small_memory", lambda *_: None)
    monkeypatch.setattr("topwork.run.fit.free_memory", lambda _: Free(1000))
    recipe = make_recipe(training={"max_steps": 1})
    _, said = told(recipe)
    assert "activation checkpointing: 1 of 2 layers, from free memory" in said


LONGEST = 172
"""Of the rows in tokens: attention that is written out takes more for longer ones."""


def test_layers_that_stay_plain_are_planned_with_what_they_keep(
    make_recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They keep more, so memory that holds a pass over fast ones is too little. DoRA that drops out runs so too."""
    taken = 10**9
    monkeypatch.setattr("topwork.run.fit.taken_memory", lambda _: taken)
    read = load_recipe(make_recipe("read"))
    known = replace(fit._memory(open_session(read, lambda _: None).base, [read], 1, 0), longest=LONGEST)
    plain = replace(known, setup=replace(known.setup, structure=replace(known.setup.structure, fast=False)))
    between = (known.needed_bytes(300, 0) + plain.needed_bytes(300, 0)) // 2
    monkeypatch.setattr("topwork.run.train.refuse_small_memory", lambda *_: None)
    monkeypatch.setattr("topwork.run.fit.free_memory", lambda _: Free(between - taken))
    assert "activation checkpointing" not in told(make_recipe("fast", training={"max_steps": 1}))[1]
    short, checkpointed = {"max_steps": 1}, "activation checkpointing: 1 of 2 layers, from free memory"
    dora: dict[str, Any] = {"use_dora": True, "lora_dropout": 0.1}
    assert checkpointed in told(make_recipe("dora", training=short, adapter=dora))[1]
    monkeypatch.setattr("topwork.run.fit.is_fast", lambda _: False)
    assert checkpointed in told(make_recipe("plain", training=short))[1]
