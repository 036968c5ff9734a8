"""How foreseen steps are told beside measured ones: the benchmark's own arithmetic."""

import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def planned_time(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("planned_time")


def case(before: float, behind: float, *seconds: float) -> dict[str, Any]:
    found = {"step": before, "layers": [2, 8], "load": 0.1}
    return {"time": [found, found | {"step": behind}], "measured": {"seconds": list(seconds)}}


def test_a_runs_first_steps_do_not_count(planned_time: ModuleType) -> None:
    assert planned_time.measured_step({"seconds": [9.0, 2.0, 4.0, 3.0]}) == 3.0
    assert planned_time.measured_step({"seconds": [9.0, 8.0, 2.0, 4.0, 3.0, 3.0]}) == 3.0
    assert planned_time.measured_step({"seconds": [9.0]}) == 9.0
    assert planned_time.error_before(case(3.3, 3.0, 9.0, 3.0, 3.0)) == pytest.approx(0.1)
    assert planned_time.time_error(case(3.3, 3.0, 9.0, 3.0, 3.0)) == pytest.approx(0.05)
    assert planned_time.drift(case(3.0, 3.3, 9.0, 3.0, 3.0)) == pytest.approx(0.1)


def test_the_table_tells_how_many_are_near_and_how_far_the_worst_is(planned_time: ModuleType) -> None:
    cases = {"one": case(3.03, 3.09, 9.0, 3.0, 3.0), "two": case(2.4, 3.0, 9.0, 3.0, 3.0), "old": {"measured": {}}}
    told = planned_time.time_text(cases)
    assert "Of the mean of both: 2 of 2 within 10%, median of the errors' sizes 6.0%, worst -10.0%" in told
    assert "Of what was foreseen before: 1 of 2 within 10%, median of the errors' sizes 10.5%, worst -20.0%" in told
    assert "by 13.5% (median; at most 25.0%)" in told
    assert "| one | 3.030 | 3.090 | 3.000 | +2.0% | +1.0% | 2 and 8 | 0.1 |" in told
    assert "| old" not in told
    assert planned_time.time_text({"old": {"measured": {}, "time": None}}) == ""


def test_cpu_time_is_counted_where_it_was_asked_for(planned_time: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", before := time.perf_counter)
    planned_time.use_clock()
    assert time.perf_counter is before
    monkeypatch.setenv(planned_time.CLOCK, "process")
    planned_time.use_clock()
    assert time.perf_counter is time.process_time
