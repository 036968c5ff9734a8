"""A step's seconds as a plan foresees them for one run of `planned.py`, after measuring this machine as `topwork plan
--calibrate` does: random weights, few layers, the recipe's rows.

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

CLOCK = "TOPWORK_PLANNED_CLOCK"
HEAD = ["predicted s a step", "measured s", "error", "layers run", "load"]


def use_clock() -> None:
    """Count CPU time where that was asked for; to be called before topwork is imported."""
    if os.environ.get(CLOCK) == "process":
        time.perf_counter = time.process_time


def main() -> None:
    use_clock()
    from topwork.plan.base import structure_named
    from topwork.plan.calibration import spread_rows
    from topwork.plan.speeds import here
    from topwork.plan.tokens import counted
    from topwork.recipe.recipe import load_recipe
    from topwork.run.calibrate import measure
    from topwork.run.plan import job_of
    from topwork.run.planning.place import find_place
    from topwork.run.planning.timing import question_of

    budget, recipes = float(sys.argv[1]), [load_recipe(Path(path)) for path in sys.argv[2:]]
    structure = structure_named(recipes[0].model)
    tokens = counted(recipes[0], structure.context_length)
    assert tokens is not None
    job = job_of(recipes, structure, find_place(None, None, "cpu"), tokens)
    question = question_of(job, job.fit, tokens)
    rows = question.rows
    lengths = spread_rows(rows.tokens, rows.learned / rows.tokens, rows.longest, tokens.percentiles)
    begun = time.perf_counter()
    found = measure(recipes, question, lengths, budget, lambda _: None, time.perf_counter)
    print(json.dumps({
        **asdict(found), "reckoned": question.reckoned(here()), "took": time.perf_counter() - begun,
        "step_tokens": question.step_tokens, "rows": asdict(rows),
    }))  # fmt: skip


def measured_step(measured: Mapping[str, Any]) -> float:
    """Of a run: the median of its steps after the first, which meets its shapes for the first time."""
    seconds = measured["seconds"]
    return float(median(seconds[1:] or seconds))


def time_error(case: Mapping[str, Any]) -> float:
    """Of a step, relative to what was measured."""
    return float(case["time"]["step"]) / measured_step(case["measured"]) - 1


def time_columns(case: Mapping[str, Any]) -> list[str]:
    """A case's row under HEAD."""
    found = case["time"]
    return [
        f"{found['step']:,.3f}", f"{measured_step(case['measured']):,.3f}", f"{time_error(case):+.1%}",
        " and ".join(map(str, found["layers"])), f"{found['load']:.1f}",
    ]  # fmt: skip


def time_told(cases: Sequence[Mapping[str, Any]]) -> str:
    """The errors of all cases, in a sentence."""
    errors = [time_error(case) for case in cases]
    near = sum(abs(error) <= 0.1 for error in errors)
    return (
        f"A step's time: {near} of {len(errors)} within 10 %, median of the errors' sizes "
        f"{median(map(abs, errors)):.1%}, worst {max(errors, key=abs):+.1%}."
    )


if __name__ == "__main__":
    main()
