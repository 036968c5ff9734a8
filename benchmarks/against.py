"""A training step of this tree beside the same step of another commit, step by step in turns.

    python benchmarks/against.py COMMIT [--pairs 24] --data-dir DATA [--rows gsm8k|banking77] [--tokens 2048]
        [--quantized] [--ranks 16] [--model smollm2-135m]

For a change of a few per cent, which a machine that other work shares hides from runs one after the other: two
processes, one in each tree, wait for each other, and the ratio is taken pair by pair. The work and its options are
`profile_step.py`'s. Prints one line; keeps no record.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import IO

from common import BENCHMARKS, threads

PAUSE = 0.03
"""Seconds between steps, in which the threads of the process that has just worked go to sleep."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given, options = parser.parse_known_args()
    if given.worker:
        work(options)
        return
    root = BENCHMARKS.parent
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "tree"
        git(root, "worktree", "add", "--detach", str(other), given.commit)
        try:
            ours, theirs = in_turns([root, other], given.pairs)
        finally:
            git(root, "worktree", "remove", "--force", str(other))
    low, middle, high = quantiles([own["seconds"] / before["seconds"] for own, before in zip(ours, theirs)], n=4)
    loss = max(abs(own["loss"] - before["loss"]) / before["loss"] for own, before in zip(ours, theirs))
    times = [f"{1e3 * median(step['seconds'] for step in steps):,.0f}" for steps in (ours, theirs)]
    print(
        f"{middle:.3f} of {given.commit}'s time (quartiles {low:.3f}–{high:.3f}, {given.pairs} pairs; {times[0]} and "
        f"{times[1]} ms); losses differ by at most {loss:.1e} of themselves"
    )


def git(root: Path, *command: str) -> None:
    subprocess.run(["git", "-C", str(root), *command], check=True, capture_output=True)


def in_turns(trees: list[Path], pairs: int) -> list[list[dict[str, float]]]:
    """What each tree's process says of each of its steps; which goes first changes every time."""
    workers = [begun(tree) for tree in trees]
    steps: list[list[dict[str, float]]] = [[] for _ in trees]
    for pair in range(pairs):
        for at in (0, 1) if pair % 2 else (1, 0):
            time.sleep(PAUSE)
            workers[at].stdin.write("\n")  # type: ignore[union-attr]
            workers[at].stdin.flush()  # type: ignore[union-attr]
            steps[at].append(said(workers[at].stdout))
    for worker in workers:
        worker.communicate()
    return steps


def begun(tree: Path) -> "subprocess.Popen[str]":
    """This script over the tree's own package and benchmarks, warmed up."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tree / "benchmarks")]), "OMP_NUM_THREADS": str(threads()),
    }  # fmt: skip
    command = [sys.executable, "-P", __file__, *sys.argv[1:], "--worker"]
    worker = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    said(worker.stdout)
    return worker


def said(stream: IO[str] | None) -> dict[str, float]:
    """The next line of a worker, which begins where its figures do."""
    for line in stream or ():
        if line.startswith("{"):
            return json.loads(line)  # type: ignore[no-any-return]
    raise SystemExit("a worker ended; what it said stands above")


def work(options: list[str]) -> None:
    """A step for every line that comes in."""
    from profile_step import WARM_UP, arguments, prepared

    sys.argv[1:] = options
    trained, stream = prepared(arguments())
    learners = [trained.learner(name) for name in trained.adapters.configs]
    for _ in range(WARM_UP):
        trained.steps(learners, [stream])
    print("{}", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        results = trained.steps(learners, [stream])
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": results[-1].loss}), flush=True)


if __name__ == "__main__":
    main()
