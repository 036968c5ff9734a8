"""A run beside other work: threads change between its steps, it says so once, and the caller has its own again."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import topwork.ops.threads
import topwork.run.training
from run.tiny import folder_bytes
from topwork.common.errors import RequestError
from topwork.ops.threads import computing_threads
from topwork.recipe.recipe import load_recipe
from topwork.run.train import train, train_together
from topwork.training.loop import Loop
from topwork.training.progress import Silent

Recipes = Callable[..., Path]
BUSY, FREE = (
    "another process keeps a core busy: 1 thread instead of 2",
    "the cores are free again: 2 threads instead of 1",
)
TRAINING = {"max_steps": 4, "eval_steps": 4}


class Beside:
    """A choice for a machine that is busy from the look `down` on, until that of `up`."""

    def __init__(self, most: int, down: int = 3, up: int = 5) -> None:
        self.count, self.looks, self.down, self.up = most, 0, down, up

    def look(self) -> str | None:
        self.looks += 1
        if self.looks == self.down:
            self.count = 1
            return BUSY
        if self.looks == self.up:
            self.count = 2
            return FREE
        return None


class Notes(Silent):
    """What a run tells."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A caller with two threads, on a machine with two cores; how many each step had."""
    before, seen = torch.get_num_threads(), []
    plain = topwork.training.loop.train_step
    monkeypatch.setattr(topwork.ops.threads, "paying_threads", lambda asked: min(asked, 2))
    monkeypatch.setattr(
        "topwork.training.loop.train_step", lambda *given: (seen.append(torch.get_num_threads()), plain(*given))[1]
    )
    torch.set_num_threads(2)
    yield seen
    torch.set_num_threads(before)


def busy(monkeypatch: pytest.MonkeyPatch, choice: Callable[[int], Any]) -> None:
    """Other work comes and goes as `choice` has it."""
    monkeypatch.setattr(topwork.run.training, "computing_threads", partial(computing_threads, choice=choice))


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_threads_change_between_steps(
    make_recipe: Recipes, two_cores: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks: the validation before the first step, and each step."""
    busy(monkeypatch, Beside)
    notes = Notes()
    run = train(make_recipe(training=TRAINING), log=lambda _: None, progress=notes)
    assert two_cores == [2, 1, 1, 2]
    assert torch.get_num_threads() == 2
    assert notes.told == [BUSY, FREE]
    changes = [record for record in records(run.folder) if record["kind"] == "threads"]
    assert changes == [
        {"kind": "threads", "step": 1, "threads": 1, "text": BUSY},
        {"kind": "threads", "step": 3, "threads": 2, "text": FREE},
    ]
    assert not {BUSY, FREE} & set(run.result["warnings"])


def test_all_that_train_together_have_it_and_one_tells(
    make_recipe: Recipes, two_cores: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    busy(monkeypatch, partial(Beside, up=99))
    told: dict[str, Notes] = {}
    recipes = [load_recipe(make_recipe(name, training=TRAINING)) for name in ("one", "two")]
    runs = train_together(recipes, log=lambda _: None, progress=lambda name: told.setdefault(name, Notes()))
    assert two_cores == [2, 1, 1, 1]
    assert torch.get_num_threads() == 2
    assert [notes.told for notes in told.values()] == [[BUSY], []]
    for run in runs:
        assert [record["threads"] for record in records(run.folder) if record["kind"] == "threads"] == [1]


@pytest.mark.parametrize("count", [1, 2])
def test_a_number_is_held_beside_anything(
    make_recipe: Recipes, two_cores: list[int], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    busy(monkeypatch, lambda _: pytest.fail("a choice was made"))
    run = train(make_recipe(training=TRAINING | {"threads": count}), log=lambda _: None)
    assert two_cores == [count] * 4
    assert torch.get_num_threads() == 2
    assert not [record for record in records(run.folder) if record["kind"] == "threads"]


def test_nothing_beside_is_the_same_run_as_a_number(
    make_recipe: Recipes, two_cores: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    busy(monkeypatch, partial(Beside, down=99))
    held, chosen = (
        train(make_recipe(str(threads), training=TRAINING | {"threads": threads}), log=lambda _: None)
        for threads in (2, "auto")
    )
    assert two_cores == [2] * 8
    assert folder_bytes(held.folder / "adapter") == folder_bytes(chosen.folder / "adapter")


def test_a_run_that_fails_gives_threads_back(
    make_recipe: Recipes, two_cores: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    busy(monkeypatch, partial(Beside, down=1))

    def fails(*_: Any) -> None:
        assert torch.get_num_threads() == 1
        raise KeyError("broken")

    monkeypatch.setattr(Loop, "_round", fails)
    with pytest.raises(KeyError, match="broken"):
        train(make_recipe(training=TRAINING), log=lambda _: None)
    assert torch.get_num_threads() == 2


def test_a_resumed_run_may_have_another_number(make_recipe: Recipes, two_cores: list[int]) -> None:
    recipe = make_recipe(training=TRAINING | {"threads": 2})
    first = train_together([load_recipe(recipe)], log=lambda _: None, stop_at=2)[0]
    assert first.result["stopped"] == "paused"
    again = train(recipe, ["training.threads=1"], resume=True, log=lambda _: None)
    assert again.result["stopped"] == "finished"
    assert two_cores == [2, 2, 1, 1]


def test_one_pass_has_one_number(make_recipe: Recipes) -> None:
    recipes = [load_recipe(make_recipe(str(count), training={"threads": count})) for count in (1, 2)]
    with pytest.raises(RequestError, match=r"training\.threads is 1 in the first and 2 in the second"):
        train_together(recipes, log=lambda _: None)


@pytest.mark.parametrize("given", ["0", "-1", "many", 0, True, 1.5])
def test_what_is_no_number_of_threads(make_recipe: Recipes, given: Any) -> None:
    with pytest.raises(RequestError, match="expected auto or a number of threads"):
        load_recipe(make_recipe(training={"threads": given}))
    assert load_recipe(make_recipe(), ["training.threads=3"]).training.threads == 3
    assert load_recipe(make_recipe()).training.threads == "auto"
