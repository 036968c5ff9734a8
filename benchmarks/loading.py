"""What reading a base takes at its peak: in 16 bits, in int8 and in NF4, each in a fresh process.

    python benchmarks/loading.py [--model smollm2-135m] [--shard-mib 48]

The model is first written anew in shards of at most --shard-mib, so that "one shard" means something. Before the peak
is taken a tiny model is read the same way: what the libraries need is not counted. Writes benchmarks/results/loading.*
"""

import argparse
import json
import sys
import tempfile
from typing import Any

from common import BENCHMARKS, run_process, surroundings, surroundings_text, table, write_record

KINDS = {"bf16": {}, "int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True}}
LIMIT = 1.15
"""Times the quantized model's size, plus one shard: what reading may take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shard-mib", type=int, default=48)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        shards = run_process("peers.read_base", "split", given.model, work, str(given.shard_mib))
        rows = {
            kind: run_process("peers.read_base", "read", work, json.dumps(options)) for kind, options in KINDS.items()
        }
    failed = [result["error"] for result in (shards, *rows.values()) if "error" in result]
    if failed:
        sys.exit(failed[0])
    record = {"model": given.model, "shards": shards, "surroundings": surroundings(), "read": rows}
    write_record(BENCHMARKS / "results" / "loading", record, text(record))
    print(text(record))


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    shard = record["shards"]["largest_bytes"]
    head = ["read as", "weights, MiB", "peak of reading, MiB", f"{LIMIT} × weights + one shard, MiB", "seconds"]
    rows = [
        [
            kind, *(f"{value / 2**20:,.1f}" for value in (
                read["weights_bytes"], read["peak_bytes"], LIMIT * read["weights_bytes"] + shard
            )), f"{read['seconds']:.1f}",
        ]
        for kind, read in record["read"].items()
    ]  # fmt: skip
    parts = [
        f"# Reading a base: {record['model']}, {record['shards']['count']} shards, one of {shard / 2**20:,.1f} MiB",
        "Resident memory of a fresh process above what it had before, files' pages included.",
        table(head, rows),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
