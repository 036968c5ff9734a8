"""A training step of this tree beside the same step of another commit, step by step in turns.

    python benchmarks/against.py COMMIT [--pairs 24] [--kinds lora,nf4,dora] [--new-lengths] [--out OUT] --data-dir DATA
        [--rows gsm8k|banking77] [--tokens 2048] [--ranks 16] [--model smollm2-135m]

For a change of a few per cent, which a machine that other work shares hides from runs one after the other: two
processes, one in each tree, wait for each other, and the ratio is taken pair by pair. The work and its options are
`profile_step.py`'s. Peaks are those of the two processes. Prints a line for each kind of step, and writes OUT.json
and OUT.md where asked to.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Any

from common import (
    BENCHMARKS,
    peak_mib,
    read_rows,
    surroundings,
    surroundings_text,
    threads,
    write_chats,
    write_record,
)

PEAK_STEPS = 4
PAUSE = 0.03
"""Seconds between steps, in which the threads of the process that has just worked go to sleep."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--kinds", default="lora", help="comma-separated, of lora, nf4, dora")
    parser.add_argument("--processes", type=int, default=3, help="fresh ones for each kind's peak")
    parser.add_argument("--out", type=Path, help="the record's path without its ending; left out, it is only printed")
    parser.add_argument("--new-lengths", action="store_true", help="other rows every step, 8 of them in a pass")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given, options = parser.parse_known_args()
    if given.worker:
        work(given.worker, options, given.new_lengths)
        return
    root, found = BENCHMARKS.parent, {}
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "tree"
        git(root, "worktree", "add", "--detach", str(other), given.commit)
        try:
            for kind in given.kinds.split(","):
                found[kind] = compared(*in_turns([root, other], given.pairs, kind))
                found[kind] |= peaks([root, other], given.processes, kind)
                print(f"{kind}: {line(found[kind], given.commit)}", flush=True)
        finally:
            git(root, "worktree", "remove", "--force", str(other))
    if given.out:
        at = options.index("--data-dir") if "--data-dir" in options else len(options)  # a place, and no option
        told = [*options[:at], *options[at + 2 :], *(["--new-lengths"] if given.new_lengths else [])]
        record = {"commit": given.commit, "options": told, "kinds": found, "surroundings": surroundings()}
        write_record(given.out, record, text(record))


def compared(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, Any]:
    """Step by step, ours over theirs."""
    low, middle, high = quantiles([own["seconds"] / before["seconds"] for own, before in zip(ours, theirs)], n=4)
    return {
        "time": middle, "low": low, "high": high, "pairs": len(ours),
        "seconds": median(step["seconds"] for step in ours), "seconds_before": median(s["seconds"] for s in theirs),
        "loss": max(abs(own["loss"] - before["loss"]) / before["loss"] for own, before in zip(ours, theirs)),
    }  # fmt: skip


def peaks(trees: list[Path], processes: int, kind: str) -> dict[str, Any]:
    """The largest resident sizes of fresh processes that take a few steps, in turns; a heap's holes move them by some
    fifty MiB from one to the next."""
    found: list[list[float]] = [[] for _ in trees]
    for _ in range(processes):
        for at, tree in enumerate(trees):
            worker = begun(tree, kind)
            output, _ = worker.communicate("\n" * PEAK_STEPS)
            found[at].append(json.loads(output.splitlines()[-1])["peak_mib"])
    return {"peaks_mib": found[0], "peaks_mib_before": found[1]}


def line(found: dict[str, Any], commit: str) -> str:
    peaks = [found[name] for name in ("peaks_mib", "peaks_mib_before")]
    told = " and ".join(f"{median(own):,.0f} ({min(own):,.0f}–{max(own):,.0f})" for own in peaks)
    ratio = median(peaks[0]) / median(peaks[1])
    return (
        f"{found['time']:.3f} of {commit}'s time (quartiles {found['low']:.3f}–{found['high']:.3f}, "
        f"{found['pairs']:.0f} pairs; {1e3 * found['seconds']:,.0f} and {1e3 * found['seconds_before']:,.0f} ms), "
        f"peaks of {len(peaks[0])} processes {told} MiB, {ratio:.3f}; losses differ by at most {found['loss']:.1e} of "
        "themselves"
    )


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    commit = record["commit"]
    lines = [f"- {kind}: {line(found, commit)}" for kind, found in record["kinds"].items()]
    lengths = ", of other rows every time" if "--new-lengths" in record["options"] else ""
    return (
        "\n".join([f"# A step beside {commit}'s{lengths}", "", *lines, "", surroundings_text(record["surroundings"])])
        + "\n"
    )


def git(root: Path, *command: str) -> None:
    subprocess.run(["git", "-C", str(root), *command], check=True, capture_output=True)


def in_turns(trees: list[Path], pairs: int, kind: str) -> list[list[dict[str, float]]]:
    """What each tree's process says of each of its steps; which goes first changes every time."""
    workers = [begun(tree, kind) for tree in trees]
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


def begun(tree: Path, kind: str) -> "subprocess.Popen[str]":
    """This script over the tree's own package and benchmarks, warmed up."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tree / "benchmarks")]), "OMP_NUM_THREADS": str(threads()),
    }  # fmt: skip
    command = [sys.executable, "-P", __file__, *sys.argv[1:], "--worker", kind]
    worker = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    said(worker.stdout)
    return worker


def said(stream: IO[str] | None) -> dict[str, float]:
    """The next line of a worker, which begins where its figures do."""
    for line in stream or ():
        if line.startswith("{"):
            return json.loads(line)  # type: ignore[no-any-return]
    raise SystemExit("a worker ended; what it said stands above")


def work(kind: str, options: list[str], new_lengths: bool) -> None:
    """A step for every line that comes in."""
    from profile_step import WARM_UP, arguments, prepared

    sys.argv[1:] = [*options, "--quantized"] if kind == "nf4" else options
    given = arguments()
    trained, batch = prepared(given)
    batches = of_new_lengths(trained, given) if new_lengths else repeat(batch)
    if kind == "dora":
        with_dora(trained)
    learners = [trained.learner(name) for name in trained.adapters.configs]
    for _ in range(WARM_UP):
        trained.steps(learners, [next(batches)])
    print("{}", flush=True)
    for _, batch in zip(sys.stdin, batches):
        start = time.perf_counter()
        results = trained.steps(learners, [batch])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "loss": results[-1].loss, "peak_mib": peak_mib()}), flush=True)


def of_new_lengths(trained: Any, given: Any) -> Iterator[Any]:
    """Pass after pass of the next eight rows."""
    from peers.topwork_step import read_examples

    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_chats(rows, read_rows(given.rows, given.data_dir))
        examples = read_examples(trained.base, str(rows), 512)
    for at in range(0, len(examples), 8):
        yield from trained.passes(examples[at : at + 8], 1 << 20)


def with_dora(trained: Any) -> None:
    """DoRA of rank 16 in the places of all adapters."""
    from topwork.adapters.config import AdapterConfig

    for name in list(trained.adapters.configs):
        trained.adapters.remove(name)
        trained.adapters.add(name, AdapterConfig(r=16, lora_alpha=32, use_dora=True), seed=0)


if __name__ == "__main__":
    main()
