"""What `topwork lint` takes over many rows: seconds, and the peak of resident memory, in a process of its own.

    python benchmarks/lint_speed.py [--rows 100000] [--model smollm2-135m] [--quick]

Rows are two short messages each, made by a seed of the words of examples/support; one in a hundred repeats another, one
in a hundred differs from another in a word. 2,000 more are `evaluation.data`. Writes benchmarks/results/lint_speed.*;
with --quick it prints alone.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import BENCHMARKS, surroundings, surroundings_text, table, write_record

SECONDS, MIB = 60, 1000
"""What 100,000 rows may take on two cores."""
SCORED = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        made = make_rows(given.rows + SCORED, random.Random(0))
        write_rows(folder / "train.jsonl", made[: given.rows])
        write_rows(folder / "test.jsonl", made[given.rows :])
        recipe = {
            "model": {"model_name_or_path": given.model},
            "data": {"train": "train.jsonl"},
            "evaluation": {"data": "test.jsonl"},
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
        measured = measure(folder / "recipe.yaml")
    record = {"rows": given.rows, "model": given.model, **measured, "surroundings": surroundings()}
    print(text(record))
    if not given.quick:
        write_record(BENCHMARKS / "results" / "lint_speed", record, text(record))


def make_rows(count: int, draw: random.Random) -> list[list[str]]:
    """[what is asked, what is answered] of each row."""
    lines = (BENCHMARKS.parent / "examples" / "support" / "train.jsonl").read_text("utf-8")
    words = sorted(set(re.findall(r"[A-Za-z]{2,}", lines)))
    rows: list[list[str]] = []
    for number in range(count):
        if number % 100 == 50:
            rows.append(draw.choice(rows))
        elif number % 100 == 99:
            asked, said = draw.choice(rows)
            rows.append([f"{asked} {draw.choice(words)}", said])
        else:
            rows.append([" ".join(draw.choices(words, k=draw.randint(*size))) + "." for size in ((8, 24), (6, 24))])
    return rows


def write_rows(path: Path, rows: list[list[str]]) -> None:
    roles = ("user", "assistant")
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            messages = [{"role": role, "content": content} for role, content in zip(roles, row)]
            file.write(json.dumps({"messages": messages}) + "\n")


def measure(recipe: Path) -> dict[str, Any]:
    """Seconds and peak of `topwork lint --json`, and what it found. This process has no torch, whose peak a child would
    begin with."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "topwork", "lint", str(recipe), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        found = json.loads(process.stdout.read())
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
        "exit_code": process.returncode,
        "tokens": found["sides"]["train"]["tokens"],
        "findings": {finding["rule"]: finding["count"] for finding in found["findings"]},
    }


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    rows = [
        ["seconds", f"{record['seconds']:.1f}", f"{SECONDS}"],
        ["processor seconds", f"{record['cpu_seconds']:.1f}", ""],
        ["peak of memory, MiB", f"{record['peak_mib']:,.0f}", f"{MIB:,}"],
    ]
    found = ", ".join(f"{rule} {count:,}" for rule, count in record["findings"].items())
    parts = [
        f"# topwork lint: {record['rows']:,} rows, {record['tokens']:,} tokens, {record['model']}",
        table(["", "measured", "may take for 100,000 rows"], rows),
        f"Found: {found}.",
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
