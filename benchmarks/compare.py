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
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from common import (
    MAX_ROWS,
    WARM_UP,
    read_rows,
    run_process,
    surroundings,
    surroundings_text,
    table,
    write_chats,
    write_record,
)

OURS = "topwork"
QLORA = "topwork_qlora"
SYSTEMS = {
    OURS: ("peers.topwork_run",),
    QLORA: ("peers.topwork_run", "qlora"),
    "trl_default": ("peers.trl_sft", "default"),
    "trl_tuned": ("peers.trl_sft", "tuned"),
    "trl_packed": ("peers.trl_sft", "packed"),
    "trl_qlora": ("peers.trl_sft", "qlora"),
    "peft_loop": ("peers.peft_loop",),
}
"""Name -> module and what it is called with, after the job."""
ALIKE_TO = {"trl_qlora": QLORA}
"""Whose losses a system's are laid beside, where that is not Topwork's on a 16-bit base."""
ALIKE = 0.02
"""Curves agree when the steps' losses differ by no more than this, on average."""

Row = dict[str, Any]


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
    parser.add_argument("--model", default="smollm2-135m")
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
    record: dict[str, Any] = {
        "question": {key: str(getattr(given, key)) for key in ("data", "model", "steps", "batch", "rounds")},
        "surroundings": surroundings(),
        "rounds": [],
    }
    with tempfile.TemporaryDirectory() as work:
        rows = Path(work) / "rows.jsonl"
        write_chats(rows, read_rows(given.data, given.data_dir))
        ready = run_process("peers.prepare", given.model, str(rows), work, str(given.steps), str(given.batch))
        if "error" in ready:
            sys.exit(f"peers.prepare: {ready['error']}")
        record["question"]["model"] = ready["model"]
        for number in range(given.rounds):
            for system in systems:
                record["rounds"].append(measured(number, system, ready["job"]))
                write_record(given.out, record, text(record, systems))
    print(given.out.with_name(given.out.name + ".md").read_text(encoding="utf-8"))


def measured(number: int, system: str, job: str) -> Row:
    """One process, and a line that tells how it went."""
    module, *mode = SYSTEMS[system]
    load = round(os.getloadavg()[0], 2)
    row = {"round": number, "system": system, "load_before": load, **run_process(module, job, *mode)}
    print(json.dumps({key: row[key] for key in row if key not in ("tokens", "learned_tokens", "seconds")}), flush=True)
    return row


def text(record: dict[str, Any], systems: Sequence[str]) -> str:
    """The record for people."""
    asked = record["question"]
    by_system = {name: [row for row in record["rounds"] if row["system"] == name] for name in systems}
    good = {name: [row for row in rows if "error" not in row] for name, rows in by_system.items()}
    failed = [
        f"{row['system']}, round {row['round'] + 1}: {row['error']}" for row in record["rounds"] if "error" in row
    ]
    parts = [
        f"# {asked['data']}: {asked['model']}, LoRA r = 16 on all linear layers, bf16",
        f"{asked['steps']} steps of {asked['batch']} sequences, the prompt masked; rounds in turns: {asked['rounds']}, "
        f"each process fresh. Real tokens per second after {WARM_UP} steps; peak resident memory of the process. "
        "Ratios are Topwork's figure over the peer's (its QLoRA's over a peer's QLoRA): more than 1 is faster, less "
        "than 1 is less memory.",
        speed_table(good),
        "Losses and gradient norms, medians over the rounds:",
        loss_table(good),
        "\n".join(f"- {sentence}" for sentence in agreements(good)),
        "TRL learns (and counts as a token) the line break after each row's end of turn; Topwork and the PEFT loop do "
        "not. trl_packed visits the rows in another order, in sequences of 512 tokens.",
        "\n".join(f"- failed: {line}" for line in failed),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def speed_table(good: dict[str, list[Row]]) -> str:
    head = ["system", "tokens/s", "min–max", "speed ratio", "spread", "peak MiB", "memory ratio", "rounds"]
    lines = []
    for name, rows in good.items():
        if not rows:
            lines.append([name, "failed", *["–"] * 6])
            continue
        rates, peaks = ([row[key] for row in rows] for key in ("tokens_per_second", "peak_mib"))
        beside = good.get(ALIKE_TO.get(name, OURS)) or []
        faster, smaller = ratios(beside, rows, "tokens_per_second"), ratios(beside, rows, "peak_mib")
        compared = ["", "", ""] if name == OURS or not faster else [
            f"{median(faster):.2f}", f"{min(faster):.2f}–{max(faster):.2f}", f"{median(smaller):.2f}"
        ]  # fmt: skip
        speed = [name, f"{median(rates):,.0f}", f"{min(rates):,.0f}–{max(rates):,.0f}"]
        lines.append([*speed, *compared[:2], f"{median(peaks):,.0f}", compared[2], str(len(rows))])
    return table(head, lines)


def ratios(ours: Sequence[Row], theirs: Sequence[Row], key: str) -> list[float]:
    """Topwork over the peer, round by round."""
    by_round = {row["round"]: row[key] for row in ours}
    return [by_round[row["round"]] / row[key] for row in theirs if row["round"] in by_round]


def loss_table(good: dict[str, list[Row]]) -> str:
    head = ["system", "first loss", "last loss", "first gradient norm", "last gradient norm", "tokens per step"]
    lines = []
    for name, rows in good.items():
        if rows:
            losses, norms = per_step(rows, "losses"), per_step(rows, "grad_norms")
            figures = (losses[0], losses[-1], norms[0], norms[-1])
            tokens = mean(per_step(rows, "tokens"))
            lines.append([name, *(f"{value:.4f}" for value in figures), f"{tokens:,.0f}"])
    return table(head, lines)


def per_step(rows: Sequence[Row], key: str) -> list[float]:
    """For each step, the median over the rounds."""
    return [median(values) for values in zip(*(row[key] for row in rows), strict=True)]


def agreements(good: dict[str, list[Row]]) -> list[str]:
    """Whether both sides learn alike, step by step; packed rows come in another order and are left out."""
    if not good[OURS]:
        return []
    learned, sentences = per_step(good[OURS], "learned_tokens"), []
    for name, rows in good.items():
        beside = ALIKE_TO.get(name, OURS)
        if name in (OURS, "trl_packed") or not rows or not good.get(beside):
            continue
        ours = per_step(good[beside], "losses")
        theirs = per_step(rows, "losses")
        if name.startswith("trl"):
            # the same sum, divided by the tokens that both learn; the one more per row is close to certain
            more = rows[0]["sequences_per_step"]
            theirs = [loss * (count + more) / count for loss, count in zip(theirs, learned, strict=True)]
        apart = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
        if name == QLORA:
            sentences.append(
                f"{name} begins with a 4-bit base, so its losses are others, by {mean(apart):.2%} on average."
            )
            continue
        verdict = "agree" if mean(apart) <= ALIKE else "do not agree"
        how = " when TRL's line breaks are taken to cost nothing" if name.startswith("trl") else ""
        sentences.append(
            f"{name} and {beside}: the loss curves {verdict}{how}. The steps' losses differ by {mean(apart):.2%} on "
            f"average, {max(apart):.2%} at most."
        )
    return sentences


if __name__ == "__main__":
    main()
