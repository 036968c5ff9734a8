"""The command line at its borders: output that nobody reads, questions that are no UTF-8, places that are refused."""

import errno
import io
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from run.fixtures import Said
from topwork.run.train import train
from topwork.training.progress import Silent

Command = Callable[..., Said]


def gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output and error of which nobody reads a byte."""
    for name in ("stdout", "stderr"):
        reading, writing = os.pipe()
        os.close(reading)
        monkeypatch.setattr(sys, name, open(writing, "w"))  # noqa: SIM115


def ended(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> int:
    from topwork.cli.app import main

    monkeypatch.setattr(sys, "argv", ["topwork", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_a_run_of_which_nobody_reads_the_lines_goes_on(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(training={"max_steps": 3})
    gone(monkeypatch)
    assert ended(["train", recipe], monkeypatch) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 3


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal to be hung up")
def test_a_terminal_that_is_hung_up_ends_no_run(
    make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(training={"max_steps": 3})
    master, slave = os.openpty()
    monkeypatch.setattr(sys, "stdout", open(slave, "w"))  # noqa: SIM115
    monkeypatch.setenv("TERM", "xterm")

    def hang_up() -> None:
        read = b""
        while b"step" not in read:
            read += os.read(master, 4096)
        os.close(master)

    reader = threading.Thread(target=hang_up)
    reader.start()
    assert ended(["train", recipe], monkeypatch) == 0
    reader.join(60)
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


def test_a_command_that_only_prints_ends_where_nobody_reads(
    make_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone(monkeypatch)
    assert ended(["count", make_recipe()], monkeypatch) == 141


class Breaks(Silent):
    """Progress on a stream that breaks."""

    def stepped(self, step: int, record: dict[str, object]) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_from_python_neither_lines_nor_progress_end_a_run(make_recipe: Callable[..., Path]) -> None:
    def log(text: str) -> None:
        raise (
            UnicodeEncodeError("latin-1", "…", 0, 1, "not in it") if text.isascii() is False else OSError(errno.EIO, "")
        )

    done = train(make_recipe(training={"max_steps": 2}), progress=Breaks(), log=log)
    assert done.result["steps"] == 2


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_an_answer_in_an_encoding_that_has_not_its_letters(
    encoding: str, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from topwork.run.chat import Chat

    def say(self: Chat, text: str, on_text: Callable[[str], None]) -> str:
        on_text(text + " → ")
        return ""

    monkeypatch.setattr(Chat, "say", say)
    reading, writing = os.pipe()
    monkeypatch.setattr(sys, "stdout", open(writing, "w", encoding=encoding))  # noqa: SIM115
    assert ended(["chat", trained, "Grüße €"], monkeypatch) == 0
    answer = os.read(reading, 4096)
    assert answer == "Grüße € → \n".encode(encoding, "backslashreplace")


def test_a_conversation_piped_in_latin_1(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from topwork.run.chat import Chat

    heard: list[str] = []

    def say(self: Chat, text: str, on_text: Callable[[str], None]) -> None:
        heard.append(text)

    monkeypatch.setattr(Chat, "say", say)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße\nÄpfel\n".encode("latin-1")), "utf-8"))
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    assert ended(["chat", trained], monkeypatch) == 0
    assert heard == ["Grüße", "Äpfel"]
    assert "the question is no UTF-8" in errors.getvalue()


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, "true", 1.5, "null", "'1'"])
def test_a_seed_that_is_none(seed: object, topwork: Command, make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    said = topwork("train", make_recipe(), "--set", f"training.seed={seed}")
    assert said.code == 2
    assert "'training.seed'" in said.err
    assert not (tmp_path / "run").exists()


def test_a_seed_of_63_bits_trains(make_recipe: Callable[..., Path]) -> None:
    done = train(make_recipe(training={"max_steps": 1, "seed": 2**63 - 1}), log=lambda _: None)
    assert done.result["steps"] == 1


PLACES = {
    "recipe.yaml": ("train", "{}"), "rows.jsonl": ("train", "recipe.yaml", "--set", "data.train={}"),
    "base": ("train", "recipe.yaml", "--set", "model.model_name_or_path={}"),
    "out": ("train", "recipe.yaml", "--set", "output_dir={}"),
    "run": ("chat", "{}", "Hi"), "scored": ("eval", "{}"), "model": ("quantize", "{}", "new"),
    "adapter": ("convert", "{}", "new"), "merged": ("merge", "{}", "new"), "told": ("report", "{}"),
    "pushed": ("push", "{}", "ada/x", "--dry-run", "new"), "counted": ("count", "{}"), "checked": ("lint", "{}"),
    "exported": ("export", "{}", "new", "--format", "peft"),
    "one": ("combine", "{}", "other", "new"), "two": ("compare", "{}", "other"),
    "swept": ("sweep", "{}", "--seeds", "2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["points to nothing", "points to itself", "too long"])
@pytest.mark.parametrize("name", PLACES)
def test_every_verb_tells_a_place_that_is_none(
    name: str, kind: str, topwork: Command, make_recipe: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recipe = make_recipe()
    monkeypatch.chdir(tmp_path)
    place = tmp_path / (name if kind != "too long" else "x" * 300)
    if kind != "too long":
        place.symlink_to(tmp_path / "gone" if kind == "points to nothing" else place)
    words = [word.replace("recipe.yaml", str(recipe)).replace("{}", str(place)) for word in PLACES[name]]
    said = topwork(*words)
    assert (said.code, "Traceback" in said.err) == (2, False), said
    assert str(place) in said.err or "x" * 40 in said.err
    assert "Errno" not in said.err
    assert not (tmp_path / "gone").exists()
    if kind == "points to nothing":
        assert f"{place} is a link to {tmp_path / 'gone'}, which is not there" in said.err
