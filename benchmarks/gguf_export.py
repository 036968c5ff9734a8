"""A model as GGUF in every type: the file's size, the seconds and memory of writing it, and what llama.cpp says of it.

    python benchmarks/gguf_export.py [--model smollm2-135m] [--tokens 12] [--types f16,q8_0]

llama.cpp is held to our own fp32 pass, place by place after our own greedy tokens. Each type is written by a fresh
process. Writes benchmarks/results/gguf_export.*
"""

import argparse
import sys
import tempfile
from typing import Any

from common import BENCHMARKS, run_process, surroundings, surroundings_text, table, write_record

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--types", default=",".join(TYPES))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours = run_process("peers.gguf_file", "ours", given.model, folder, str(given.tokens))
        types = {type: run_process("peers.gguf_file", type, given.model, folder) for type in given.types.split(",")}
    failed = [result["error"] for result in [ours, *types.values()] if "error" in result]
    if failed:
        sys.exit(failed[0])
    record = {"model": given.model, "tokens": given.tokens, **ours, "types": types, "surroundings": surroundings()}
    write_record(BENCHMARKS / "results" / "gguf_export", record, text(record))
    print(text(record))


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    rows = [
        [
            type, f"{found['bytes'] / 2**20:,.1f}", f"{found['seconds']:.1f}", f"{found['peak_mib']:,}",
            f"{found['mean_difference']:.1e}", f"{found['largest_difference']:.1e}",
            f"{found['agreed']} of {found['positions']}", f"{found['answers_equal']} of {found['answers']}",
        ]
        for type, found in record["types"].items()
    ]  # fmt: skip
    head = ["type", "file, MiB", "seconds", "peak, MiB", "mean nats apart", "at most", "likeliest as ours", "answers"]
    parts = [
        f"# {record['model']} as GGUF, in llama.cpp",
        f"{record['prompts']} questions, answers of up to {record['tokens']} tokens. Nats are those of the 20 tokens "
        f"that are likeliest to llama.cpp, beside our fp32 pass of the base's {record['dtype']} weights; it rounds "
        "what a product reads too, to the type's partner (16 bits, or 8 for quantized types). Answers are those that "
        "come out as ours when it goes on by itself. Memory is that of the process that writes: Python with what it "
        f"imports takes {record['idle_mib']:,} MiB of it, the largest weight {record['largest_mib']:,.0f}. "
        "Pages of the checkpoint's file that have been read count in it.",
        table(head, rows),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
