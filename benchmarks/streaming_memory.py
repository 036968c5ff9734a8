"""What streaming a large file takes: memory, the seconds of the index, rows a second, and the same rows after a resume.

    python benchmarks/streaming_memory.py [--gigabytes 2] [--steps 300] [--batch-size 32] [--tokenizer plain]

Writes a JSONL of made conversations in a folder of its own, which is removed in the end. A fresh process reads it
through `load_data` and its row source, as training does but for the model. Its tokenizer is read alone (`plain`), or as
`topwork train` opens it (`auto`). Writes benchmarks/results/streaming_memory.*, or streaming_memory_auto.*
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from common import BENCHMARKS, run_process, surroundings, surroundings_text, table, write_record

LIMIT_BYTES = 500 * 10**6
WORDS = [
    "order",
    "parcel",
    "invoice",
    "refund",
    "delivery",
    "address",
    "account",
    "window",
    "lamp",
    "kettle",
    "broken",
    "late",
    "twice",
    "since",
    "monday",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tokenizer", choices=("plain", "auto"), default="plain")
    given = parser.parse_args()
    wanted = round(given.gigabytes * 10**9)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < 2 * wanted:
        sys.exit(f"{tempfile.gettempdir()} has {free:,} bytes free, and twice {wanted:,} are wanted")
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "rows.jsonl"
        write_rows(file, wanted)
        streamed = run_process("peers.stream_rows", str(file), str(given.steps), str(given.batch_size), given.tokenizer)
    if "error" in streamed:
        sys.exit(streamed["error"])
    record = {"surroundings": surroundings(), **streamed}
    name = "streaming_memory" if given.tokenizer == "plain" else "streaming_memory_auto"
    write_record(BENCHMARKS / "results" / name, record, text(record))
    print(text(record))


def write_rows(file: Path, wanted_bytes: int) -> None:
    """Conversations of two messages, of about 600 bytes each and all different."""
    draw, written, number = Random(0), 0, 0
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(20, 60))) for _ in range(5000)]
    with open(file, "w", encoding="utf-8") as out:
        while written < wanted_bytes:
            asked = f"Order {number}: {texts[number % 4999]}"
            said = f"About order {number}: {texts[number % 4993]}"
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            written += out.write(json.dumps({"messages": messages}) + "\n")
            number += 1


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    mb = {name: f"{record[name] / 10**6:,.0f}" for name in ("before_bytes", "index_bytes", "peak_bytes", "file_bytes")}
    rows = [
        ["file, MB", mb["file_bytes"]],
        ["rows to learn", f"{record['rows']:,}"],
        ["peak of the process, MB", f"{mb['peak_bytes']} (limit {LIMIT_BYTES / 10**6:,.0f})"],
        ["… of which Python, libraries and tokenizer, before any row", mb["before_bytes"]],
        ["… peak when the index stood", mb["index_bytes"]],
        ["seconds to the first step", f"{record['index_seconds']:.0f}"],
        ["rows read and encoded a second, in steps", f"{record['rows_per_second']:,.0f}"],
        ["a step of so many rows, ms", f"{record['batch_size']}: {record['step_milliseconds']:.1f}"],
        ["same rows when begun at a later step", str(record["resumed_alike"])],
    ]
    return "\n\n".join([
        "# Streaming a file that is larger than the memory that it may take",
        "`ru_maxrss` of a fresh process that loads the data and asks the row source for steps; no model is loaded.",
        table(["", ""], rows),
        surroundings_text(record["surroundings"]),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
