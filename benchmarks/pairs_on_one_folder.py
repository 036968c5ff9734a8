"""Two processes started at one moment on one folder: how often exactly one goes on, and the other is told of it.

    python benchmarks/pairs_on_one_folder.py [--pairs 200] [--sweeps 10]

Real processes of the command line, forked from one that has imported everything, on a base of two layers: into a new
folder, with --overwrite, with --resume, with one of each, and as sweeps. A pair counts where one ends well with the
bytes that it gives alone, and the other ends with exit code 2, names the first's process, host and time, and leaves
nothing behind.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import BENCHMARKS, surroundings, surroundings_text, table, write_record

sys.path.insert(0, str(BENCHMARKS.parent / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--sweeps", type=int, default=10, help="so many of the pairs are sweeps, which take longest")
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        found = started_in_pairs(Path(work), given.pairs, given.sweeps)
    record = {"surroundings": surroundings(), "seconds": round(time.monotonic() - started), "kinds": found}
    write_record(BENCHMARKS / "results" / "pairs_on_one_folder", record, text(record))
    print(text(record))
    if any(kind["wrong"] for kind in found.values()):
        sys.exit(1)


def started_in_pairs(work: Path, pairs: int, sweeps: int) -> dict[str, Any]:
    """By kind how many pairs there were, in how many one went on, and what was wrong with the others."""
    from run import tiny
    from run.processes import Commands
    from run.two_processes import KINDS, ONE, pair

    base, rows = tiny.write_model(work / "base"), tiny.write_rows(work / "rows.jsonl", tiny.rows(40))
    (work / "logs").mkdir()
    (work / "pairs").mkdir()
    commands = Commands(work / "logs")
    others = [kind for kind in KINDS if kind != "sweep"]
    found: dict[str, Any] = {}
    for number in range(pairs):
        kind = "sweep" if number >= pairs - sweeps else others[number % len(others)]
        told = pair(kind, commands, base, rows, work / "pairs")
        counted = found.setdefault(kind, {"pairs": 0, "one went on": 0, "first that was asked": 0, "wrong": []})
        counted["pairs"] += 1
        counted["one went on"] += told in ONE
        counted["first that was asked"] += told == ONE[0]
        counted["wrong"] += [] if told in ONE else [told]
        print(f"{number + 1}/{pairs} {kind}: {told}", file=sys.stderr, flush=True)
    commands.close()
    return found


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    kinds = record["kinds"]
    names = ("pairs", "one went on", "first that was asked")
    rows = [[kind, *(str(found[name]) for name in names)] for kind, found in kinds.items()]
    rows.append(["all", *(str(sum(found[name] for found in kinds.values())) for name in names)])
    wrong = [f"- {kind}: {told}" for kind, found in kinds.items() for told in found["wrong"]]
    return "\n\n".join([
        "# Two processes on one folder",
        "Pairs of `topwork` commands let go at one moment. One went on: it ended well, with the bytes that it gives "
        "alone, and the other ended with exit code 2, named the first's process, host and time, and left nothing.",
        table(["", "pairs", "one went on", "… the one that was forked first"], rows),
        *(["What was wrong:", "\n".join(wrong)] if wrong else []),
        surroundings_text(record["surroundings"]),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
