"""What people see of adapters that train together."""

import io

import pytest
from rich.console import Console

from topwork.run.console_together import TogetherLines, TogetherTable

RECORD = {"loss": 1.25, "tokens_per_second": 5432.1}


def tell(progress: TogetherTable | TogetherLines) -> None:
    good, bad = progress("r-8"), progress("r-64")
    for member in (good, bad):
        member.validated(0, {"loss": 2.0})
    for member in (good, bad):
        member.started(0, 40)
    for step in range(1, 41):
        good.stepped(step, RECORD)
        if step < 6:
            bad.stepped(step, RECORD)
        elif step == 6:
            bad.note("diverged")
            bad.ended("diverged")
    good.validated(40, {"loss": 1.5})
    good.ended("finished")
    good.finished()
    bad.finished()


def test_plain_lines_tell_each_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    tell(TogetherLines())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "r-8: step 0: validation loss 2.0000"
    assert lines[2].startswith("r-8: step 4/40  loss 1.2500  5,432 tokens/s of the pass  ")
    assert "note: r-64: diverged" in lines
    assert "r-64: diverged after step 5" in lines
    assert lines[-1] == "r-8: finished after step 40"
    assert len([line for line in lines if line.startswith("r-8: step ")]) == 12


def test_the_table_has_a_row_for_each_and_how_it_ended() -> None:
    out = io.StringIO()
    table = TogetherTable(Console(file=out, force_terminal=True, width=120))
    tell(table)
    assert [row.cells() for row in table.rows] == [
        ["r-8", "40/40", "1.2500", "1.5000", "", "", "finished"],
        ["r-64", "5/40", "1.2500", "2.0000", "", "", "diverged"],
    ]
    assert "diverged" in out.getvalue()
    assert "tokens/s of the pass" in out.getvalue()


def test_a_member_that_was_stopped_is_not_called_finished() -> None:
    table = TogetherTable(Console(file=io.StringIO(), force_terminal=True))
    member = table("a")
    member.started(0, 10)
    member.stepped(3, RECORD)
    assert table.rows[0].cells()[4:] == ["5,432", table.rows[0].cells()[5], "training"]
    member.finished()
    assert table.rows[0].state == "stopped"
