"""Topwork beside its peers: the same weights, rows, order and optimizer, in turns, each time in a fresh process.

    python benchmarks/compare.py --data gsm8k --data-dir DATA --steps 10 --batch 8 --rounds 3 \
        --peers trl_default,trl_tuned,trl_packed,peft_loop --out benchmarks/results/NAME

DATA holds gsm8k/train.jsonl and banking77/train.csv. Writes NAME.json (every round as it came) and NAME.md. What is
lost stands there as well. Run it on an otherwise idle machine; the load average before each process is recorded.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from compare_text import OURS, QLORA, Row, text
from floor import floor_report

from common import (
    MAX_ROWS,
    WARM_UP,
    Job,
    model_argument,
    read_rows,
    run_process,
    surroundings,
    write_chats,
    write_record,
)

SYSTEMS = {
    OURS: ("peers.topwork_run",),
    QLORA: ("peers.topwork_run", "qlora"),
    "trl_default": ("peers.trl_sft", "default"),
    "trl_tuned": ("peers.trl_sft", "tuned"),
    "trl_packed": ("peers.trl_sft", "packed"),
    "trl_qlora": ("peers.trl_sft", "qlora"),
    "peft_loop": ("peers.peft_loop",),
    "peft_loop_qlora": ("peers.peft_loop", "qlora"),
}
"""Name -> module and what it is called with, after the job."""


def arguments() -> argparse.Namespace:
    peers = [name for name in SYSTEMS if name != OURS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("gsm8k", "banking77"), default="gsm8k")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--rounds", type=int, default=3)
    usual = "trl_default,trl_tuned,trl_packed,peft_loop"
    parser.add_argument("--peers", default=usual, help=f"comma-separated, of {', '.join(peers)}")
    parser.add_argument("--model", default="smollm2-135m", help="an alias, a Hub id or a folder (random_base.py)")
    parser.add_argument(
        "--tokens-per-pass", type=int, help="choose each step's rows to fill one pass of so many tokens for Topwork"
    )
    parser.add_argument("--out", type=Path, required=True, help="the record's path without its ending")
    given = parser.parse_args()
    given.peers = [name for name in given.peers.split(",") if name]
    unknown = [name for name in given.peers if name not in peers]
    if unknown:
        parser.error(f"unknown peer {unknown[0]!r}; there are {', '.join(peers)}")
    if given.steps <= WARM_UP or given.steps * given.batch > MAX_ROWS:
        parser.error(f"--steps is more than {WARM_UP}, and --steps times --batch at most {MAX_ROWS:,} rows")
    return given


def main() -> None:
    given = arguments()
    systems = [OURS, *given.peers]
    asked = ("data", "steps", "batch", "rounds", "tokens_per_pass")
    record: dict[str, Any] = {
        "question": {key: getattr(given, key) for key in asked},
        "surroundings": surroundings(),
        "rounds": [],
    }
    with tempfile.TemporaryDirectory() as work:
        ready = prepared(given, Path(work))
        record["question"]["model"] = ready["model"]
        speeds: list[Row] = []
        for number in range(given.rounds):
            for system in systems:
                record["rounds"].append(measured(number, system, ready["job"]))
                write_record(given.out, record, text(record, systems))
            speeds.append(matrix_speed(ready))
            record["floor"] = floor_of(speeds, ready, given.batch)
            write_record(given.out, record, text(record, systems))
    print(given.out.with_name(given.out.name + ".md").read_text(encoding="utf-8"))


def prepared(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """What all systems start from."""
    rows = work / "rows.jsonl"
    write_chats(rows, read_rows(given.data, given.data_dir))
    options = json.dumps({key: getattr(given, key) for key in ("steps", "batch", "tokens_per_pass")})
    ready = run_process("peers.prepare", model_argument(given.model), str(rows), str(work / "job"), options)
    if "error" in ready:
        sys.exit(f"peers.prepare: {ready['error']}")
    return ready


def matrix_speed(ready: dict[str, Any]) -> Row:
    """The machine's speed on this model's products, measured in a process of its own."""
    share = sum(learned for _, learned in ready["lengths"]) / sum(length for length, _ in ready["lengths"])
    load = round(os.getloadavg()[0], 2)
    return {"load_before": load, **run_process("floor", ready["folder"], str(share))}


def floor_of(speeds: list[Row], ready: dict[str, Any], batch: int) -> Row:
    """The floor of the steps that are counted."""
    failed = [speed for speed in speeds if "error" in speed]
    return failed[0] if failed else floor_report(speeds, ready["lengths"][WARM_UP * batch :], Job.read(ready["job"]).r)


def measured(number: int, system: str, job: str) -> Row:
    """One process, and a line that tells how it went."""
    module, *mode = SYSTEMS[system]
    load = round(os.getloadavg()[0], 2)
    row = {"round": number, "system": system, "load_before": load, **run_process(module, job, *mode)}
    print(json.dumps({key: row[key] for key in row if key not in ("tokens", "learned_tokens", "seconds")}), flush=True)
    return row


if __name__ == "__main__":
    main()
