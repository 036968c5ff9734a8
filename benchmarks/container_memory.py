"""How training ends in a container: what it plans, what it takes and how it ends, under limits on its memory.

    python benchmarks/container_memory.py [--limits 700,800,900,1000,1200,1350,1500,2000] [--steps 2] [--before SRC]

Each is a fresh `topwork train` of examples/support in a control group of its own (version 1 or 2, made as root), with
batches that fill a pass. `--before` names the `src` of another commit, which is run under the same limits; the last
rows are address space and data (`ulimit -v`, `-d`) in place of a group. Writes benchmarks/results/container_memory.*
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import BENCHMARKS, surroundings, surroundings_text, table, write_record

sys.path.insert(0, str(BENCHMARKS.parent / "tests"))
from reference.containers import container

RECIPE = BENCHMARKS.parent / "examples" / "support" / "recipe.yaml"
RLIMITS = {"ulimit -v": "RLIMIT_AS", "ulimit -d": "RLIMIT_DATA"}
PLANNED = re.compile(r"^tokens per pass: ([\d,]+)", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limits", default="700,800,900,1000,1200,1350,1500,2000", help="MB of the control groups")
    parser.add_argument("--addresses", default="1500,2000,2500,3500", help="MB of ulimit -v")
    parser.add_argument("--data", default="700,900,1200,1600", help="MB of ulimit -d")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--before", help="the src folder of another commit")
    given = parser.parse_args()
    asked = [("container", int(limit)) for limit in given.limits.split(",")]
    rlimits = [("ulimit -v", given.addresses), ("ulimit -d", given.data)]
    asked += [(kind, int(limit)) for kind, limits in rlimits for limit in limits.split(",") if limit]
    sources = {"now": BENCHMARKS.parent / "src"} | ({"before": Path(given.before)} if given.before else {})
    runs = []
    for kind, limit in asked:
        found = {name: ended(kind, limit * 10**6, source, given.steps) for name, source in sources.items()}
        runs.append({"kind": kind, "limit_mb": limit, **found})
        print(runs[-1], flush=True)
    record = {"surroundings": surroundings(), "runs": runs}
    write_record(BENCHMARKS / "results" / "container_memory", record, text(record))
    print(text(record))


def ended(kind: str, limit_bytes: int, source: Path, steps: int) -> dict[str, Any]:
    """One training: what it planned, its peak and its end."""
    with tempfile.TemporaryDirectory() as work:
        changes = {
            "training.max_steps": steps, "training.eval_steps": steps, "training.batch_size": 20, "data.max_rows": 60,
            "data.eval_fraction": 0.2, "output_dir": f"{work}/run",
        }  # fmt: skip
        options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "topwork", "train", str(RECIPE), *options]
        environment = os.environ | {"PYTHONPATH": str(source), "TOKENIZERS_PARALLELISM": "false"}
        if kind == "container":
            with container(limit_bytes) as group:
                done = group.run(command, env=environment)
                peak = group.peak_bytes
        else:
            how: dict[str, Any] = {"env": environment, "preexec_fn": _limited(kind, limit_bytes)}
            done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
            peak = None
    planned = PLANNED.search(done.stdout)
    return {
        "tokens_per_pass": int(planned[1].replace(",", "")) if planned else None,
        "smaller": len(re.findall(r"^out of memory .*: on with", done.stdout, re.MULTILINE)),
        "peak_mb": None if peak is None else round(peak / 10**6),
        "exit_code": done.returncode,
        "said": "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [""])[-1][:300],
    }


def _limited(kind: str, limit_bytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(getattr(resource, RLIMITS[kind]), (limit_bytes, limit_bytes))


def _end(found: dict[str, Any]) -> str:
    """In a few words."""
    if found["exit_code"] == 0:
        return "finished" + (f", passes halved {found['smaller']}x" if found["smaller"] else "")
    if found["exit_code"] in (-9, 137):
        return "killed"
    planned = "refused before training" if found["exit_code"] == 2 else "ended in a sentence"
    return planned if found["said"].startswith("error: ") else f"exit code {found['exit_code']}, no sentence"


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    names = [name for name in ("before", "now") if name in record["runs"][0]]
    head = ["limit, MB", *(f"{name}: {what}" for name in names for what in ("tokens per pass", "peak, MB", "end"))]
    rows = []
    for run in record["runs"]:
        cells = [f"{run['kind']} {run['limit_mb']:,}"]
        for name in names:
            found = run[name]
            cells += [f"{found['tokens_per_pass'] or '-'}", f"{found['peak_mb'] or '-'}", _end(found)]
        rows.append(cells)
    said = [run["now"]["said"] for run in record["runs"] if run["now"]["said"]]
    return "\n\n".join([
        "# Training in a container",
        "The peak is the control group's, with the files that it had in its cache, which the kernel takes back before "
        "it ends a process.",
        table(head, rows),
        *([f"What was said where it did not finish, first and last: `{said[0]}` `{said[-1]}`"] if said else []),
        surroundings_text(record["surroundings"]),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
