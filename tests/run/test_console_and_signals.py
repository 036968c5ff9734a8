"""What a run says while it goes, and what it does when it is asked to stop."""

import io
import os
import signal

import pytest
from rich.console import Console

from topwork.run.console import Counter, TrainingBar, TrainingLines
from topwork.training.interrupts import Interrupts
from topwork.training.progress import Progress

RECORD = {"loss": 1.25, "tokens_per_second": 5432.1}


def test_one_signal_is_remembered_and_a_second_breaks_off() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupts() as interrupts:
        assert not interrupts.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def tell(progress: Progress) -> None:
    progress.started(0, 90)
    progress.validated(0, {"loss": 2.0, "perplexity": 7.389})
    for step in range(1, 91):
        progress.stepped(step, RECORD)
    progress.note("something to know")
    progress.finished()


def test_plain_lines_are_about_thirty(capsys: pytest.CaptureFixture[str]) -> None:
    tell(TrainingLines())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 0: validation loss 2.0000 (perplexity 7.39)"
    assert lines[1].startswith("step 1/90  loss 1.2500  5,432 tokens/s  ")
    assert lines[-2].startswith("step 90/90  ")
    assert lines[-1] == "note: something to know"
    assert len(lines) == 33
    assert not any("\x1b" in line for line in lines)


def test_plain_lines_of_a_run_that_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    lines = TrainingLines()
    lines.started(89, 90)
    lines.stepped(90, RECORD)
    assert capsys.readouterr().out.startswith("step 90/90  ")


def test_the_bar_shows_loss_speed_and_what_was_said() -> None:
    out = io.StringIO()
    tell(TrainingBar(Console(file=out, force_terminal=True, width=100)))
    assert "step 90/90" in out.getvalue()
    assert "loss 1.2500  5,432 tokens/s" in out.getvalue()
    assert "note: something to know" in out.getvalue()


@pytest.mark.parametrize("total", [1, 3, 40])
def test_a_counter_tells_each_quarter_once(total: int) -> None:
    told: list[str] = []
    with Counter("answers", total, told.append) as counter:
        for _ in range(total):
            counter(1)
    assert told[-1] == f"answers: {total}/{total}"
    assert len(told) == len(set(told)) == min(total, 4)
