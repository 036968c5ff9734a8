"""A step of DoRA, and one of LoRA with dropout, beside a plain LoRA step: the same rows, in turns in one process.

    python benchmarks/beside_lora.py [--rounds 10] [--model smollm2-135m] [--tokens 2048] [--out OUT]

r16 on all linear layers, over a base in bf16 and in NF4 with double quantization; the order changes every round. DoRA
computes the rows' lengths in every pass and keeps most of what its magnitudes multiply; the aim is at most 1.25 x
LoRA's time and 1.1 x its memory. Peaks are of fresh processes. Writes benchmarks/results/beside_lora.*, or OUT.*.
"""

import argparse
import json
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from checkpointing import PEAK_STEPS, WARM_UP, Arm, load

from common import BENCHMARKS, peak_mib, run_processes, surroundings, surroundings_text, table, write_record

BASES: dict[str, dict[str, bool]] = {"bf16": {}, "nf4": {"load_in_4bit": True}}
METHODS: dict[str, dict[str, float]] = {"lora": {}, "dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.05}}
MOST_TIME, MOST_MEMORY = 1.25, 1.1


def in_turns(model: str, tokens: int, rounds: int, held: str) -> dict[str, Any]:
    """Steps of all methods over one base."""
    from topwork.adapters.graft import Adapters

    base = load(model, **BASES[held])
    adapters = Adapters(base.module)
    arms = [Arm(base, adapters, method, **METHODS[method]) for method in METHODS]
    steps: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for turn in range(WARM_UP + rounds):
        for arm in arms if turn % 2 else arms[::-1]:
            steps[arm.name].append(arm.step(tokens, seed=turn))
    return steps


def alone(model: str, tokens: int, held: str, method: str) -> dict[str, int]:
    """The peak of a process that does nothing else."""
    from topwork.adapters.graft import Adapters

    base = load(model, **BASES[held])
    arm = Arm(base, Adapters(base.module), method, **METHODS[method])
    for seed in range(PEAK_STEPS):
        arm.step(tokens, seed)
    return {"peak_mib": peak_mib()}


def told(record: dict[str, Any]) -> str:
    """The record for people."""
    head = ["base held in", "step", "ms", "over LoRA's", "quartiles", "peak, MiB", "over LoRA's"]
    rows = []
    for held in BASES:
        lora, least = record["steps"][held]["lora"][WARM_UP:], record["peaks"][held]["lora"]["peak_mib"]
        for method in METHODS:
            own, peak = record["steps"][held][method][WARM_UP:], record["peaks"][held][method]["peak_mib"]
            low, middle, high = quantiles([step["seconds"] / other["seconds"] for step, other in zip(own, lora)], n=4)
            rows.append([
                held, method, f"{1e3 * median(step['seconds'] for step in own):,.0f}", f"{middle:.3f}",
                f"{low:.3f}–{high:.3f}", f"{peak:,}", f"{peak / least:.3f}",
            ])  # fmt: skip
    parts = [
        f"# Steps beside one of plain LoRA: {record['model']}, r = 16 on all linear layers",
        f"One pass of {record['tokens']:,} tokens, rows of 150-300; {record['rounds']} steps of each in turns after "
        f"one to warm up, the ratio taken step by step. Dropout is 0.05. Peaks are of fresh processes. DoRA's aim is "
        f"at most {MOST_TIME} x LoRA's time and {MOST_MEMORY} x its memory.",
        table(head, rows),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "beside_lora")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.process:
        held, _, method = asked.process.partition(":")
        given = (asked.model, asked.tokens)
        found = alone(*given, held, method) if method else in_turns(*given, asked.rounds, held)
        print(json.dumps(found))
        return
    options = ["--rounds", str(asked.rounds), "--model", asked.model, "--tokens", str(asked.tokens)]
    wanted = [*BASES, *(f"{held}:{method}" for held in BASES for method in METHODS)]
    done = run_processes("beside_lora", options, wanted)
    record = {
        "model": asked.model, "tokens": asked.tokens, "rounds": asked.rounds,
        "steps": {held: done[held] for held in BASES},
        "peaks": {held: {method: done[f"{held}:{method}"] for method in METHODS} for held in BASES},
        "surroundings": surroundings(),
    }  # fmt: skip
    write_record(asked.out, record, told(record))
    print(told(record))


if __name__ == "__main__":
    main()
