"""Training has Python's collector look through what stays only once."""

import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from topwork.recipe.recipe import load_recipe
from topwork.run.train import train
from topwork.training import loop
from topwork.training.collector import looked_through_once


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    gc.unfreeze()
    before = list(gc.callbacks)
    yield
    assert gc.callbacks == before
    gc.unfreeze()


def test_what_a_full_collection_leaves_is_not_looked_through_again() -> None:
    with looked_through_once():
        gc.collect(1)
        assert gc.get_freeze_count() == 0
        gc.collect()
        first = gc.get_freeze_count()
        assert first > 10_000
        later = [[] for _ in range(50_000)]  # type: ignore[var-annotated]
        gc.collect()
        assert gc.get_freeze_count() <= first
        del later
    assert gc.get_freeze_count() == 0


def test_an_error_thaws_too() -> None:
    with suppress(KeyError), looked_through_once():
        gc.collect()
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_froze_stays_so() -> None:
    gc.freeze()
    with looked_through_once():
        gc.collect()
    assert gc.get_freeze_count() > 0


def test_a_run_trains_within_it(make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    proper, counts = loop.train_step, []

    def spied(*given: object, **options: object) -> object:
        gc.collect()
        counts.append(gc.get_freeze_count())
        return proper(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", spied)
    train(load_recipe(make_recipe(training={"max_steps": 2})), log=lambda _: None)
    assert len(counts) == 2
    assert min(counts) > 10_000
    assert gc.get_freeze_count() == 0
