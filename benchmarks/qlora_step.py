"""A QLoRA step beside a LoRA step: the same rows, one pass of 2,048 tokens, in turns in one process.

    python benchmarks/qlora_step.py [--rounds 10] [--model smollm2-135m] [--tokens 2048]

LoRA r16 on all linear layers over a base in bf16, in NF4 with double quantization, and in int8; which goes first
changes every round. Peaks are of fresh processes. Writes benchmarks/results/qlora_step.*. For peers see compare.py.
"""

import argparse
import json
from statistics import median, quantiles
from typing import Any

from checkpointing import PEAK_STEPS, WARM_UP, Arm, load

from common import BENCHMARKS, peak_mib, run_processes, surroundings, surroundings_text, table, write_record

ARMS: dict[str, dict[str, bool]] = {"bf16": {}, "nf4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}}
MIB = 2**20


def arm_of(model: str, name: str) -> tuple[Arm, int]:
    """A base of its own with an adapter, and what its weights take."""
    from topwork.adapters.graft import Adapters
    from topwork.quantization.linear import weight_bytes

    base = load(model, **ARMS[name])
    held = weight_bytes(base.module)
    return Arm(base, Adapters(base.module), name), held


def in_turns(model: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Every arm's steps."""
    arms = [arm_of(model, name)[0] for name in ARMS]
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for turn in range(WARM_UP + rounds):
        first = turn % len(arms)
        for arm in arms[first:] + arms[:first]:
            steps[arm.name].append(arm.step(tokens, seed=turn))
    return steps


def alone(model: str, tokens: int, name: str) -> dict[str, int]:
    """The peak of a process that does nothing else."""
    arm, held = arm_of(model, name)
    for seed in range(PEAK_STEPS):
        arm.step(tokens, seed)
    return {"peak_mib": peak_mib(), "weights_bytes": held}


def told(record: dict[str, Any]) -> str:
    """The record for people."""
    steps, peaks = record["steps"], record["peaks"]
    head = [
        "base held in",
        "step, ms",
        "over LoRA's",
        "quartiles",
        "weights, MiB",
        "less",
        "peak, MiB",
        "less",
        "last loss",
    ]
    rows = []
    for name, own in steps.items():
        pairs = zip(own[WARM_UP:], steps["bf16"][WARM_UP:])
        ratios = [step["seconds"] / lora["seconds"] for step, lora in pairs]
        low, _, high = quantiles(ratios, n=4)
        weights, peak = peaks[name]["weights_bytes"] / MIB, peaks[name]["peak_mib"]
        rows.append([
            name, f"{1e3 * median(step['seconds'] for step in own[WARM_UP:]):,.0f}", f"{median(ratios):.3f}",
            f"{low:.3f}–{high:.3f}", f"{weights:,.1f}", f"{peaks['bf16']['weights_bytes'] / MIB - weights:,.1f}",
            f"{peak:,}", f"{peaks['bf16']['peak_mib'] - peak:,}", f"{own[-1]['loss']:.4f}",
        ])  # fmt: skip
    parts = [
        f"# A step over a base in fewer bits: {record['model']}, LoRA r = 16 on all linear layers",
        f"One pass of {record['tokens']:,} tokens, rows of 150-300; {len(steps['bf16']) - WARM_UP} steps of each in "
        "turns after one to warm up, the ratio taken step by step. Peaks are of fresh processes.",
        table(head, rows),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--process", choices=["all", *ARMS], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.process:
        given = (asked.model, asked.tokens)
        found = in_turns(*given, asked.rounds) if asked.process == "all" else alone(*given, asked.process)
        print(json.dumps(found))
        return
    options = ["--rounds", str(asked.rounds), "--model", asked.model, "--tokens", str(asked.tokens)]
    done = run_processes("qlora_step", options, ("all", *ARMS))
    record = {
        "model": asked.model, "tokens": asked.tokens, "steps": done.pop("all"), "peaks": done,
        "surroundings": surroundings(),
    }  # fmt: skip
    write_record(BENCHMARKS / "results" / "qlora_step", record, told(record))
    print(told(record))


if __name__ == "__main__":
    main()
