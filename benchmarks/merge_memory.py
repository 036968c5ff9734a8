"""What merging an adapter into a base takes at its peak, tensor by tensor: resident memory over the start, and seconds.

    python benchmarks/merge_memory.py [--shape llama-3.2-1b] [--rank 16] [--work FOLDER]

The base has random weights in bf16, in shards of 512 MiB; the adapter is a LoRA on all linear layers. `topwork merge`
runs in a fresh process, without its check (which runs the model, and takes the model's memory). Writes
benchmarks/results/merge_memory.*
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import BENCHMARKS, run_process, surroundings, surroundings_text, table, write_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--work", type=Path, help="where base and result lie meanwhile: twice the base's size")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        made = run_process("peers.merge_base", "make", work, given.shape, str(given.rank))
        merged = made if "error" in made else run_process("peers.merge_base", "merge", work)
    if "error" in merged:
        sys.exit(merged["error"])
    record = {
        "shape": given.shape, "rank": given.rank, "surroundings": surroundings(), "made": made, "merged": merged
    }  # fmt: skip
    write_record(BENCHMARKS / "results" / "merge_memory", record, text(record))
    print(json.dumps(merged))


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    made, merged = record["made"], record["merged"]
    rows = [
        ["the base's weights", _mib(made["base_bytes"])],
        ["its largest shard", _mib(made["shard_bytes"])],
        ["its largest tensor, which passes through (embedding and head)", _mib(made["largest_bytes"])],
        ["its largest tensor that is merged", _mib(made["merged_bytes"])],
        ["the adapter, fp32", _mib(made["adapter_bytes"])],
        ["the process before the merge", _mib(merged["start_bytes"])],
        ["**peak of the merge above that, files' pages included**", f"**{_mib(merged['peak_bytes'])}**"],
    ]
    parts = [
        f"# Merging: {record['shape']}, random weights in bf16, LoRA r = {record['rank']} on all linear layers",
        table(["", "MiB"], rows),
        f"{merged['seconds']:.1f} s, checksums and fsync included; rounding took {merged['share']:.1%} of what this "
        "adapter, which is random too, adds.",
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"


if __name__ == "__main__":
    main()
