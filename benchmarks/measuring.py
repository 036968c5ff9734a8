"""`topwork eval` of a run, without and with its adapter, beside the same by another commit, in turns.

    python benchmarks/measuring.py RUN [--commit 762a944] [--rows 300] [--rounds 3] [--out OUT]

RUN is a finished run's folder, such as `make quickstart` leaves (runs/support); it is copied, and stays as it is. Each
measuring is a fresh process, whose clock begins before the base is read. Writes OUT.json and OUT.md
(benchmarks/results/measuring).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from against import git

from common import BENCHMARKS, peak_mib, surroundings, surroundings_text, table, threads, write_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--commit", default="762a944", help="the last before generation's engine was made anew")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "measuring", help="without its ending")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measured(given.run, given.rows)))
        return
    root = BENCHMARKS.parent
    record: dict[str, Any] = {
        "commit": given.commit, "rows": given.rows, "surroundings": surroundings(), "rounds": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "tree"
        git(root, "worktree", "add", "--detach", str(other), given.commit)
        try:
            for number in range(given.rounds):
                trees = {"now": root, "before": other}
                for name in trees if number % 2 else reversed(trees):
                    copy = Path(folder) / f"run-{number}-{name}"
                    shutil.copytree(given.run, copy, ignore=shutil.ignore_patterns("checkpoints"))
                    load = round(os.getloadavg()[0], 2)
                    row = {"round": number, "tree": name, "load_before": load}
                    record["rounds"].append(row | in_process(trees[name], copy, given.rows))
                    print(json.dumps(record["rounds"][-1]), flush=True)
                    write_record(given.out, record, text(record))
        finally:
            git(root, "worktree", "remove", "--force", str(other))
    print(text(record))


def in_process(tree: Path, run: Path, rows: int) -> dict[str, Any]:
    """`measured` by the tree's own package."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(BENCHMARKS)]), "OMP_NUM_THREADS": str(threads()),
    }  # fmt: skip
    command = [sys.executable, "-P", __file__, str(run), "--rows", str(rows), "--worker"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{tree}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measured(run: Path, rows: int) -> dict[str, Any]:
    """Both scores of a run, and what they took."""
    import torch

    import topwork

    torch.set_num_threads(threads())
    begun = time.perf_counter()
    scores = topwork.evaluate(run, max_rows=rows, log=lambda _: None)
    seconds = time.perf_counter() - begun
    kept = {
        arm: {key: scores[arm][key] for key in ("loss", "json_valid", "exact_match")} for arm in ("before", "after")
    }
    return {"seconds": seconds, "peak_mib": peak_mib(), "scores": kept}


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = []
    for name, called in (("before", record["commit"]), ("now", "this tree")):
        own = [row for row in record["rounds"] if row["tree"] == name]
        if own:
            seconds = [row["seconds"] for row in own]
            after = own[-1]["scores"]["after"]
            lines.append([
                called, f"{median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f})",
                f"{max(row['peak_mib'] for row in own):,.0f}", f"{after['loss']:.4f}", f"{after['exact_match']:.1%}",
            ])  # fmt: skip
    parts = [
        f"# Measuring {record['rows']} rows, without and with the adapter",
        "Fresh processes in turns, the base read in each; medians, the least and the most in brackets.",
        table(["tree", "seconds", "peak MiB", "loss with the adapter", "exact match with it"], lines),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
