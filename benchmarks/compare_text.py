"""The record of compare.py for people: speed, memory, the floor, losses and gradient norms."""

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from common import WARM_UP, surroundings_text, table

OURS = "topwork"
QLORA = "topwork_qlora"
ALIKE_TO = {"trl_qlora": QLORA, "peft_loop_qlora": QLORA}
"""Whose losses a system's are laid beside, where that is not Topwork's on a 16-bit base."""
ALIKE = 0.02
"""Curves agree when the steps' losses differ by no more than this, on average."""

Row = dict[str, Any]


def text(record: dict[str, Any], systems: Sequence[str]) -> str:
    """The record for people."""
    asked = record["question"]
    by_system = {name: [row for row in record["rounds"] if row["system"] == name] for name in systems}
    good = {name: [row for row in rows if "error" not in row] for name, rows in by_system.items()}
    failed = [
        f"{row['system']}, round {row['round'] + 1}: {row['error']}" for row in record["rounds"] if "error" in row
    ]
    parts = [
        f"# {asked['data']}: {asked['model']}, {asked.get('adapter', 'LoRA r = 16 on all linear layers')}, bf16",
        f"{asked['steps']} steps of {asked['batch']} sequences, the prompt masked; rounds in turns: {asked['rounds']}, "
        f"each process fresh. Real tokens per second after {WARM_UP} steps; peak resident memory of the process. "
        "Ratios are Topwork's figure over the peer's (its QLoRA's over a peer's QLoRA): more than 1 is faster, less "
        "than 1 is less memory.",
        passes_text(asked),
        speed_table(good),
        floor_text(record.get("floor"), good),
        "Losses and gradient norms, medians over the rounds:",
        loss_table(good),
        "\n".join(f"- {sentence}" for sentence in agreements(good)),
        "TRL learns (and counts as a token) the line break after each row's end of turn; Topwork and the PEFT loop do "
        "not. trl_packed visits the rows in another order, in sequences of 512 tokens.",
        "\n".join(f"- failed: {line}" for line in failed),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def passes_text(asked: dict[str, Any]) -> str:
    if not asked.get("tokens_per_pass"):
        return ""
    return (
        f"Each step's rows are chosen to hold at most {int(asked['tokens_per_pass']):,} tokens, and nearly as many: "
        "one pass for Topwork, one padded batch for the peers."
    )


def floor_text(floor: dict[str, Any] | None, good: dict[str, list[Row]]) -> str:
    """What of the floor's speed Topwork reaches."""
    if not floor:
        return ""
    if "error" in floor:
        return f"The floor was not measured: {floor['error']}"
    lines = []
    for name in (OURS, QLORA):
        if good.get(name):
            rate = median(row["tokens_per_second"] for row in good[name])
            bounds = (floor["tokens_per_second"], floor["tokens_per_second_at_peak"])
            lines.append(
                [name, f"{rate:,.0f}", *(cell for at in bounds for cell in (f"{at:,.0f}", f"{rate / at:.0%}"))]
            )
    head = ["system", "tokens/s", "floor, tokens/s", "reached", "floor at the peak shape", "reached"]
    counted = {sum(row["tokens"][WARM_UP:]) for name in (OURS, QLORA) for row in good.get(name, [])}
    told = [floor_sentences(floor), table(head, lines)]
    if counted - {floor["tokens"]}:
        told.append(f"The floor is not of these steps: it counts {floor['tokens']:,} tokens, Topwork {counted}.")
    return "\n\n".join(told)


def floor_sentences(floor: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {value / 1e9:,.3f}" for name, value in floor["parts_per_token"].items())
    rates, peak = floor["flops_per_second_by_round"], floor["peak"]
    median_rate, low, high = (value / 1e9 for value in (floor["flops_per_second"], min(rates), max(rates)))
    return (
        f"The floor (`floor.py`): {floor['flops_per_token'] / 1e9:,.3f} billion operations a token at least ({parts}; "
        f"sequences of {floor['attended_length']:,.0f} tokens, weighted by their length). The machine multiplies the "
        f"model's own shapes in bf16 at {median_rate:,.0f} billion operations a second (the rounds' median; "
        f"{low:,.0f}–{high:,.0f}), its fastest, {' × '.join(map(str, peak['shape']))}, at "
        f"{peak['flops_per_second'] / 1e9:,.0f}."
    )


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
