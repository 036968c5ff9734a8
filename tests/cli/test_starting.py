"""What is said before torch is imported: a command that takes its seconds says at once what for."""

import io
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console

from topwork.cli.app import app
from topwork.common.telling import doing
from topwork.run.console import Counter, Teller, TrainingBar, training_progress
from topwork.run.console_together import TogetherTable, together_progress

COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
LIGHT = {"report", "serve-key", "count", "import", "plan", "init", "advise", "models", "recipes"}
"""They need no torch."""
ARGUMENTS = {
    "train": ["recipe.yaml"], "sweep": ["recipe.yaml", "--grid", "adapter.r=2,4"], "lint": ["recipe.yaml"],
    "eval": ["run"], "chat": ["run", "Hello?"], "merge": ["run", "out"], "combine": ["a", "b", "out"],
    "compare": ["a", "b"], "export": ["run", "out", "--format", "peft"], "convert": ["a", "out"],
    "push": ["run", "ada/x"], "quantize": ["tiny", "out"], "serve": ["tiny"], "doctor": [],
}  # fmt: skip
RECIPE = "model: {model_name_or_path: smollm2-135m}\ndata: {train: rows.jsonl}\noutput_dir: run\n"
STAND_IN = "import sys; sys.stdin.readline(); print('torch is imported', flush=True); raise SystemExit(7)"
"""What `import torch` finds: it waits for whoever reads the output to have read the first line."""
LIMIT_SECONDS = 60


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of modules that come before the installed ones, and a recipe beside them."""
    folder = tmp_path_factory.mktemp("stand-ins")
    for name in ("torch", "transformers", "datasets", "numpy"):
        (folder / f"{name}.py").write_text(STAND_IN, "utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, "utf-8")
    return folder


def test_each_command_that_needs_torch_is_tried() -> None:
    assert set(ARGUMENTS) == COMMANDS - LIGHT


@pytest.mark.parametrize("command", sorted(ARGUMENTS))
def test_a_line_stands_before_torch_is_imported(command: str, without_torch: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(without_torch)!r}); from topwork.cli.app import main; main()"
    started = subprocess.Popen(
        [sys.executable, "-c", code, command, *ARGUMENTS[command]], cwd=without_torch, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert started.stdout is not None
    first = started.stdout.readline()  # nothing was written to its input, so an import before this would wait for ever
    rest, _ = started.communicate("go on\n", LIMIT_SECONDS)
    assert first in ("loading torch and transformers ...\n", "loading torch ...\n"), first + rest
    assert "torch is imported" in rest
    assert started.returncode == 7


def on_a_terminal() -> tuple[Teller, io.StringIO]:
    out = io.StringIO()
    return Teller(console=Console(file=out, force_terminal=True, width=100)), out


def test_a_status_goes_away_on_a_terminal_and_lines_stay() -> None:
    log, out = on_a_terminal()
    with log:
        doing(log, "reading the base")
        assert "reading the base ..." in out.getvalue()
        doing(log, "running it")
        log("a line of the run")
    before, line, after = out.getvalue().partition("a line of the run\n")
    assert line
    assert "running it ..." in before
    assert after.rpartition("...")[2].count("\x1b[2K") == 1  # the line of the status is erased in the end


def test_elsewhere_what_is_done_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Teller() as log:
        doing(log, "reading the base")
        log("a line")
    doing(print, "reading the rows")
    assert capsys.readouterr().out == "reading the base ...\na line\nreading the rows ...\n"


def test_a_bar_takes_the_place_of_the_status() -> None:
    """A terminal has one live display, and a second one is an error."""
    for make in (training_progress, lambda log: together_progress(log)("one")):
        log, out = on_a_terminal()
        doing(log, "validating")
        progress = make(log)
        progress.started(0, 2)
        progress.stepped(1, {"loss": 1.0, "tokens_per_second": 5.0})
        progress.finished()
        assert "1/2" in out.getvalue()
    log, out = on_a_terminal()
    doing(log, "measuring")
    with Counter("answers", 4, log) as counter:
        counter(4)
    assert "4/4" in out.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_where_lines_go_and_not_into_what_a_program_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    out, errors = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setenv("TERM", "xterm")
    log = Teller(sys.stderr)
    with Counter("answers", 4, log) as counter:
        counter(4)
    assert isinstance(training_progress(log), TrainingBar)
    assert isinstance(together_progress(log), TogetherTable)
    doing(log, "reading the base")
    print('{"rows": 4}')
    log.quiet()
    with Counter("answers", 4, lambda _: None) as counter:
        counter(4)
    assert "4/4" in errors.getvalue()
    assert out.getvalue() == '{"rows": 4}\n'


def test_the_first_steps_line_tells_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = training_progress()
    progress.started(0, 90)
    progress.stepped(1, {"loss": 1.25, "tokens_per_second": 100.0})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 1/90  loss 1.2500")
    assert line.endswith(" s left")


def test_versions_are_told_without_what_they_are_of() -> None:
    code = """
import sys
from topwork.cli.app import app
try:
    app(["--version"], prog_name="topwork")
except SystemExit as end:
    print(end.code or 0, sorted({"torch", "transformers", "numpy", "datasets"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, last = done.stdout.splitlines()
    assert first == f"topwork {version('topwork')}"
    for named in ("torch", "transformers"):
        assert f"{named} {version(named)}" in second
    assert "Python 3." in second
    assert last == "0 []"
