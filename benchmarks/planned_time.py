"""A step's seconds as a plan foresees them for one run of `planned.py`, after measuring this machine as `topwork plan
--calibrate` does: random weights, few layers, the recipe's rows. It is measured before the run and once more behind it:
how far the two lie apart is the machine's own drift, which no prediction knows.

    python -m planned_time SECONDS RECIPE [RECIPE …]

SECONDS is what its steps may take. The last line printed is what was found, as JSON. It is a process of its own, so
that the run that follows finds nothing warm. TOPWORK_PLANNED_CLOCK=process makes both count a single thread's CPU time,
which says something on a machine that others use too.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from common import run_process, table

CLOCK = "TOPWORK_PLANNED_CLOCK"
NEAR = 0.1
"""How far a foreseen step may be off."""
STEADY = 0.03
"""Where both measurements lie so near, the machine was the same all the while."""
HEAD = ["run", "before s a step", "behind", "measured s", "error", "of the one before", "layers run", "load"]


def use_clock() -> None:
    """Count CPU time where that was asked for; to be called before topwork is imported."""
    if os.environ.get(CLOCK) == "process":
        time.perf_counter = time.process_time


def main() -> None:
    use_clock()
    from topwork.plan.base import structure_named
    from topwork.plan.speeds import here
    from topwork.plan.tokens import counted
    from topwork.recipe.recipe import load_recipe
    from topwork.run.calibrate import measure
    from topwork.run.plan import job_of
    from topwork.run.planning.place import find_place
    from topwork.run.planning.timing import question_of, step_rows

    budget, recipes = float(sys.argv[1]), [load_recipe(Path(path)) for path in sys.argv[2:]]
    structure = structure_named(recipes[0].model)
    tokens = counted(recipes[0], structure.context_length)
    assert tokens is not None
    job = job_of(recipes, structure, find_place(None, None, "cpu"), [tokens])
    question = question_of(job, job.fit, tokens)
    rows = question.rows
    lengths = step_rows(job, question, tokens)
    begun = time.perf_counter()
    found = measure(recipes, question, lengths, budget, lambda _: None, time.perf_counter)
    print(json.dumps({
        **asdict(found), "reckoned": question.reckoned(here()), "took": time.perf_counter() - begun,
        "step_tokens": question.step_tokens, "rows": asdict(rows),
    }))  # fmt: skip


def foreseen(recipes: Sequence[Path], seconds: float) -> dict[str, Any]:
    """What a process of this module finds. Exits where it failed."""
    found = run_process("planned_time", str(seconds), *map(str, recipes))
    if "error" in found:
        sys.exit(f"measuring steps of {recipes[0].stem}: {found['error']}")
    return found


def measured_step(measured: Mapping[str, Any]) -> float:
    """Of a run: the median of its steps after the first third, in which memory is met for the first time."""
    seconds = measured["seconds"]
    return float(median(seconds[len(seconds) // 3 :]))


def time_error(case: Mapping[str, Any]) -> float:
    """Of a step, relative to what was measured: of the mean of what was foreseen before and behind the run."""
    before, behind = (found["step"] for found in case["time"])
    return (before + behind) / 2 / measured_step(case["measured"]) - 1


def error_before(case: Mapping[str, Any]) -> float:
    """The same of what was foreseen before."""
    return float(case["time"][0]["step"]) / measured_step(case["measured"]) - 1


def drift(case: Mapping[str, Any]) -> float:
    """How far what was foreseen behind the run lies from what was foreseen before."""
    before, behind = (found["step"] for found in case["time"])
    return float(behind / before) - 1


def time_text(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """The record's second part, for people: a step of each case that was foreseen."""
    told = {name: case for name, case in cases.items() if case.get("time")}
    if not told:
        return ""
    rows = []
    for name, case in told.items():
        before, behind = case["time"]
        rows.append([
            name, f"{before['step']:,.3f}", f"{behind['step']:,.3f}", f"{measured_step(case['measured']):,.3f}",
            f"{time_error(case):+.1%}", f"{error_before(case):+.1%}", " and ".join(map(str, before["layers"])),
            f"{before['load']:.1f}",
        ])  # fmt: skip
    drifts = [abs(drift(case)) for case in told.values()]
    steady = [time_error(case) for case in told.values() if abs(drift(case)) <= STEADY]
    sentences = (
        "A step's time was foreseen after steps of random models with as many layers as told were measured, for a few "
        "seconds before each run and once more behind it. Measured is the median of a run's steps behind the first "
        "third.",
        _summed("Of the mean of both", [time_error(case) for case in told.values()]),
        _summed("Of what was foreseen before", [error_before(case) for case in told.values()]),
        f"The same measurement behind the run gave another number by {median(drifts):.1%} (median; at most "
        f"{max(drifts):.1%}): so far the machine itself drifts within a minute.",
        _summed(f"Of the mean, where the two lie within {STEADY:.0%}", steady) if steady else "",
    )
    return "\n## Time\n\n" + "\n\n".join([*filter(None, sentences), table(HEAD, rows)]) + "\n"


def _summed(name: str, errors: Sequence[float]) -> str:
    near = sum(abs(error) <= NEAR for error in errors)
    return (
        f"{name}: {near} of {len(errors)} within {NEAR:.0%}, median of the errors' sizes "
        f"{median(map(abs, errors)):.1%}, worst {max(errors, key=abs):+.1%}."
    )


if __name__ == "__main__":
    main()
