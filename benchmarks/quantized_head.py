"""What an int8 or NF4 output head costs in loss, and what it saves: an NF4 base with each head, on the same text.

    python benchmarks/quantized_head.py --text FILE [--model smollm2-135m] [--windows 64]

Each process is fresh and its own. Writes benchmarks/results/quantized_head.*
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import BENCHMARKS, run_process, surroundings, surroundings_text, table, write_record

HEADS = ("16bit", "int8", "nf4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=64)
    given = parser.parse_args()
    asked = [given.model, str(given.text.resolve()), str(given.windows)]
    heads = {head: run_process("peers.text_loss", *asked, json.dumps({"head": head})) for head in HEADS}
    failed = [result["error"] for result in heads.values() if "error" in result]
    if failed:
        sys.exit(failed[0])
    record = {"model": given.model, "text": given.text.name, "heads": heads, "surroundings": surroundings()}
    write_record(BENCHMARKS / "results" / "quantized_head", record, text(record))
    print(text(record))


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    first = record["heads"]["16bit"]
    rows = [
        [
            head, f"{found['weights_bytes'] / 2**20:,.1f}", f"{found['nats']:.4f}",
            f"{found['nats'] - first['nats']:+.4f}", f"{found['perplexity']:.2f}", f"{found['seconds']:.1f}",
        ]
        for head, found in record["heads"].items()
    ]  # fmt: skip
    parts = [
        f"# The output head in fewer bits: {record['model']}, NF4 with double quantization",
        f"{first['windows']} windows of {first['window_tokens']} tokens of {record['text']}, the same for all. A head "
        "that is tied to the embedding is one weight with it: both are quantized.",
        table(["head", "weights, MiB", "nats per token", "difference", "perplexity", "seconds"], rows),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
