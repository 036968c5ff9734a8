"""Two hundred kills at random moments of loading, training, validation, saving, writing and scoring, and what is lost.

    python benchmarks/kills.py [--kills 200] [--a-run 8] [--seed 0] [--out OUT]

Real commands in processes of their own, on a tiny random base, get SIGKILL, SIGTERM, SIGHUP or SIGUSR1 and go on with
--resume (`tests/run/kills.py`). Held after each: its exit code and what it said, that no file is half written, that no
step is lost beyond the last checkpoint (none at all by a signal that asks), and in the end that adapter, last
checkpoint and scores are those of a run that nobody disturbed. Exits with 1 where anything was wrong. Writes OUT.json
and OUT.md (benchmarks/results/kills).
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import BENCHMARKS, surroundings, surroundings_text, table, write_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--a-run", type=int, default=8, help="about so many of them in each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "kills", help="without its ending")
    given = parser.parse_args()
    asked = {key: getattr(given, key) for key in ("kills", "a_run", "seed")}
    record: dict[str, Any] = {"question": asked, "surroundings": surroundings(), "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as work:
        record |= killed(given, Path(work))
    write_record(given.out, record, text(record))
    print(text(record))
    sys.exit(1 if record["wrong"] else 0)


def killed(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The runs, and what came of them."""
    sys.path.insert(0, str(BENCHMARKS.parent / "tests"))
    from run import tiny
    from run.kills import Kills
    from run.processes import Commands

    (work / "logs").mkdir()
    commands = Commands(work / "logs")
    begun = time.perf_counter()
    try:
        base, rows = tiny.write_model(work / "tiny-llama"), tiny.write_rows(work / "rows.jsonl", tiny.rows(40))
        told = Kills(commands, base, rows, work, given.seed).run(
            given.kills, given.a_run, lambda line: print(line, flush=True)
        )
    finally:
        commands.close()
    counts = [
        {"signal": number, "phase": phase, "kills": count} for (number, phase), count in sorted(told.kills.items())
    ]
    return {
        "seconds": time.perf_counter() - begun, "kills": counts, "runs": told.runs, "resumed": told.resumed,
        "late": told.late, "wrong": told.wrong,
    }  # fmt: skip


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    counts = {(one["signal"], one["phase"]): one["kills"] for one in record["kills"]}
    numbers = sorted({number for number, _ in counts})
    phases = list(dict.fromkeys(phase for _, phase in sorted(counts, key=lambda key: key[1])))
    rows = [[phase, *(str(counts.get((number, phase), 0)) for number in numbers)] for phase in phases]
    rows.append(["all", *(str(sum(counts.get((number, phase), 0) for phase in phases)) for number in numbers)])
    wrong = record["wrong"]
    parts = [
        f"# {sum(counts.values())} kills in {record['runs']} runs",
        f"{record['resumed']} of the commands went on with --resume; {record['late']} signals were meant for a phase "
        f"that did not come any more, and are not counted. {record['seconds']:.0f} seconds; load average "
        f"{record['load_before']:.1f} before.",
        table(["hit in", *numbers], rows),
        f"Half written, lost beyond the last step or checkpoint, ended otherwise than promised, or other bytes in the "
        f"end than an unbroken run's: {len(wrong)}.",
        *(["\n".join(f"- {one}" for one in wrong)] if wrong else []),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
