"""`topwork chat --compare A B`: two models in one batch."""

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from run import tiny
from run.fixtures import Said
from topwork.common.errors import RequestError
from topwork.generation.engine import Engine
from topwork.generation.sampling import Sampling
from topwork.run.chat import answer
from topwork.run.compare import open_pair
from topwork.run.console_pair import both_shown
from topwork.run.train import train

ASKED = "Order 7: my lamp hums."
SAMPLING = Sampling(max_new_tokens=10)
Command = Callable[..., Said]


@pytest.fixture(scope="module")
def terse(tiny_llama: Path, tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run over the same base, which says something else."""
    folder = tmp_path_factory.mktemp("terse")
    values = tiny.recipe_values(
        tiny_llama, tickets, folder / "terse", adapter={"r": 2},
        training={"learning_rate": 0.03, "max_steps": 5, "eval_steps": 5, "seed": 3},
    )  # fmt: skip
    return train(tiny.write_recipe(folder / "recipe.yaml", values), log=lambda _: None).folder


@pytest.fixture(scope="module")
def alone(trained: Path, terse: Path) -> dict[str, str]:
    """What each says when nobody else is asked."""
    said = {run.name: answer(run, ASKED, sampling=SAMPLING) for run in (trained, terse)}
    said["base"] = answer(trained, ASKED, adapter=False, sampling=SAMPLING)
    assert len(set(said.values())) == 3
    return said


def test_two_runs_say_what_each_says_alone(
    trained: Path, terse: Path, alone: dict[str, str], topwork: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = []
    made = Engine.__init__
    monkeypatch.setattr(
        Engine, "__init__", lambda self, *given, **more: engines.append(1) or made(self, *given, **more)
    )
    said = topwork("chat", "--compare", trained, terse, ASKED, "--max-new-tokens", 10)
    assert said.code == 0, said.err
    assert said.out == f"{trained.name}:\n{alone[trained.name]}\n\nterse:\n{alone['terse']}\n"
    assert len(engines) == 1, "both in one batch"


def test_both_are_written_at_once(trained: Path, terse: Path) -> None:
    came: list[int] = []
    pair = open_pair((str(trained), str(terse)), SAMPLING, log=lambda _: None)
    answers = pair.say(ASKED, lambda side, _: came.append(side))
    assert came.index(1) < len(came) - 1 - came[::-1].index(0), "not one after the other"
    texts = ["", ""]
    pair.forget()
    pair.say(ASKED, lambda side, piece: texts.__setitem__(side, texts[side] + piece))
    assert texts == answers


def test_a_run_beside_the_base_and_beside_a_peft_folder(
    trained: Path, terse: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    peft = tmp_path / "elsewhere"
    shutil.copytree(terse / "adapter", peft)
    for names, expected in (
        (("base", str(trained)), ["base", trained.name]),
        ((str(peft), str(trained)), ["terse", trained.name]),
        ((str(peft), "base"), ["terse", "base"]),
    ):
        pair = open_pair(names, SAMPLING, log=lambda _: None)
        assert [side.label for side in pair.sides] == [Path(name).name for name in names]
        if names[1] != "base":  # a foreign folder has no system message, so there may be another prompt
            assert pair.say(ASKED) == [alone[name] for name in expected]
        else:
            one, other = pair.say(ASKED)
            assert one != other


def test_each_goes_on_with_its_own_answers(
    trained: Path, terse: Path, topwork: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def say(*lines: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        said = topwork("chat", "--compare", trained, terse, "--max-new-tokens", 3)
        assert said.code == 0, said.err
        assert "each question goes to both" in said.err
        return said.out

    once = say(ASKED)
    assert say(ASKED, "/new", ASKED) == once + once
    assert say(ASKED, "/quit", ASKED) == say("", "/unknown", ASKED) == once
    pair = open_pair((str(trained), str(terse)), Sampling(max_new_tokens=3), log=lambda _: None)
    first = pair.say(ASKED)
    assert [side.turns[1].content for side in pair.sides] == first


def test_a_question_that_has_no_room_leaves_the_pair_as_it_was(trained: Path, terse: Path) -> None:
    pair = open_pair((str(trained), str(terse)), SAMPLING, log=lambda _: None)
    with pytest.raises(RequestError, match="context"):
        pair.say("word " * 2000)
    assert all(side.turns == [] for side in pair.sides)
    assert len(pair.say(ASKED)) == 2


def test_what_cannot_be_compared(trained: Path, topwork: Command, tmp_path: Path) -> None:
    for words, told in (
        (("base", "base"), "these are the same"),
        ((trained, trained), "these are the same"),
        ((trained, f"{tmp_path}/nothing"), "neither a run's folder"),
        (("base",), "give two"),
        ((trained, "base", "--model", "models/nowhere"), "models/nowhere"),
        ((trained, "base", "--base"), "give one of them"),
    ):
        said = topwork("chat", "--compare", *words)
        assert (said.code, said.out) == (2, "")
        assert told in said.err
    said = topwork("chat", trained, "my lamp", "hums")
    assert said.code == 2
    assert "in quotes" in said.err


def test_columns_on_a_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, height=12, color_system=None)
    with both_shown(["left", "[b]right"], console) as shown:
        for number in range(40):
            shown.add(0, f"line {number}\n")
        shown.add(1, "[red]not markup[/red]")
    seen = out.getvalue().split("\x1b[")[-1].split("\n")
    heads = [line for line in seen if "left" in line and "[b]right" in line]
    assert len(heads) == 1, "all of it once, when both have ended"
    rows = [line for line in seen if "line " in line]
    assert len(rows) == 40
    assert "[red]not markup[/red]" in rows[0], "side by side"
