"""The record of `serving_speed.py` for people: medians and quartiles, and each ratio taken round by round."""

from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

from common import surroundings_text, table

Row = dict[str, Any]
Key = tuple[str, str]

TITLES = {"alone": "alone", "sixteen": "16", "sixteen_adapters": "16 over 8 adapters"}


def text(record: Row) -> str:
    """All thread counts, one after the other."""
    question, parts = record["question"], []
    lengths = question["prompt_tokens"]
    parts.append(f"# One base, many adapters: {question['model']}, {question['tokens']} tokens after GSM8K questions")
    parts.append(
        f"Greedy, {question['rounds']} rounds in turns; prompts of {min(lengths)} to {max(lengths)} tokens (median "
        f"{median(lengths):g}). Medians, quartiles in brackets; ratios are taken round by round. Tokens/s count the "
        "whole time from the first request to the last token, prompts included; the share of the bound counts the "
        "tokens after the first."
    )
    for threads in question["threads"]:
        rows = [row for row in record["rounds"] if row["threads"] == threads]
        if rows:
            parts += _of_threads(threads, rows, record["systems"])
    parts.append(surroundings_text(record["surroundings"]))
    return "\n\n".join(parts) + "\n"


def _of_threads(threads: int, rows: list[Row], systems: Row) -> list[str]:
    measured = [row for row in rows if "seconds" in row]
    found: dict[Key, dict[int, Row]] = {}
    for row in measured:
        found.setdefault((row["system"], row["arm"]), {})[row["round"]] = row
    loads = [row["load_before"] for row in measured]
    told = f" (load average {min(loads):.1f} to {max(loads):.1f} before a measurement)" if loads else ""
    parts = [f"## {threads} thread{'s' if threads > 1 else ''}{told}"]
    lines = [
        [
            f"{name}, {TITLES[arm]}", _spread([_speed(row) for row in own.values()]),
            _spread([row["first_seconds"] for row in own.values()], "{:.2f}"),
            f"{max(row['peak_mib'] for row in own.values()):,.0f}",
        ]
        for (name, arm), own in found.items()
    ]  # fmt: skip
    parts.append(table(["system", "tokens/s", "seconds to all first tokens", "peak MiB"], lines))
    reads = {row["round"]: row for row in rows if row["system"] == "bandwidth"}
    parts += _bound(found, reads, systems) + _ratios(found) + _clients(found) + _agreement(rows)
    return parts


def _speed(row: Row) -> float:
    return row["tokens"] / row["seconds"]


def _decoded(row: Row) -> float:
    """Tokens a second after the first; of one sequence."""
    return (row["tokens"] - 1) / (row["seconds"] - row["first_seconds"])


def _bound(found: dict[Key, dict[int, Row]], reads: dict[int, Row], systems: Row) -> list[str]:
    if not reads:
        return []
    speed = _spread([row["bytes_per_second"] / 1e9 for row in reads.values()])
    best = max(row["best"] for row in reads.values()) / 1e9
    lines = []
    for name in [name for name in systems if "weight_bytes" in systems[name] and (name, "alone") in found]:
        weights, own = systems[name]["weight_bytes"], found[name, "alone"]
        shares = [_decoded(own[at]) * weights / reads[at]["bytes_per_second"] for at in own if at in reads]
        lines.append([
            f"{name} ({systems[name]['runner']})", f"{weights / 1e6:,.0f}",
            _spread([row["bytes_per_second"] / weights for row in reads.values()]),
            _spread([_decoded(row) for row in own.values()]), _spread(shares, "{:.0%}"),
        ])  # fmt: skip
    head = ["alone", "MB read a token", "bound, tokens/s", "reached", "share, round by round"]
    return [f"Reading: {speed} GB/s, {best:.1f} at best.", table(head, lines)]


_16, _MIXED = "sixteen", "sixteen_adapters"
_LLAMA: list[Key] = [("llama_f16", "alone"), ("llama_bf16", "alone")]
RATIOS: list[tuple[str, Key, list[Key], str]] = [
    ("alone, NF4 ÷ bf16", ("topwork_nf4", "alone"), [("topwork", "alone")], "≥ 1.8"),
    ("16 over 8 adapters ÷ PEFT's mixed batch", ("topwork", _MIXED), [("peft", _MIXED)], "≥ 4"),
    ("16 over 8 adapters ÷ 16 without", ("topwork", _MIXED), [("topwork", _16)], "≥ 0.7"),
    ("alone ÷ transformers", ("topwork", "alone"), [("transformers", "alone")], ""),
    ("16 ÷ transformers", ("topwork", _16), [("transformers", _16)], ""),
    ("alone ÷ llama.cpp in 16 bits, its faster", ("topwork", "alone"), _LLAMA, "≥ 0.9"),
    ("16 ÷ llama.cpp in 16 bits", ("topwork", _16), [("llama_f16", _16)], ""),
    ("16 over 8 ÷ llama.cpp in 16 bits", ("topwork", _MIXED), [("llama_f16", _MIXED)], "≥ 3"),
    ("alone, NF4 ÷ llama.cpp's Q4_0", ("topwork_nf4", "alone"), [("llama_q4_0", "alone")], "≥ 0.9"),
    ("16 over 8, NF4 ÷ llama.cpp's Q4_0", ("topwork_nf4", _MIXED), [("llama_q4_0", _MIXED)], "≥ 3"),
    (
        "alone, NF4 with an int8 head ÷ Q4_1 with Q8_0",
        ("topwork_nf4_head8", "alone"),
        [("llama_q4_1", "alone")],
        "≥ 0.9",
    ),
    ("16, over HTTP ÷ the engine at hand", ("http", _16), [("topwork", _16)], ""),
    ("16 over 8, over HTTP ÷ the engine at hand", ("http", _MIXED), [("topwork", _MIXED)], ""),
]
"""What is told, ours, who it is beside (the faster of them), and what it should be."""


def _ratios(found: dict[Key, dict[int, Row]]) -> list[str]:
    lines = []
    for told, ours, others, wanted in RATIOS:
        beside = [found[key] for key in others if key in found]
        if ours not in found or not beside:
            continue
        both = [at for at in found[ours] if all(at in other for other in beside)]
        ratios = [_speed(found[ours][at]) / max(_speed(other[at]) for other in beside) for at in both]
        if ratios:
            lines.append([told, _spread(ratios, "{:.2f}"), wanted])
    return [table(["tokens/s, ours ÷ theirs", "round by round", "meant"], lines)] if lines else []


def _clients(found: dict[Key, dict[int, Row]]) -> list[str]:
    """The server's own figures."""
    lines = []
    for (name, arm), own in found.items():
        first = sorted(value for row in own.values() for value in row.get("first_tokens", []))
        if not first:
            continue
        memory = [row["client_mib"] for row in own.values() if row.get("client_mib") is not None]
        between = sorted(value for row in own.values() for value in row["between_tokens"])
        lines.append([
            f"{name}, {TITLES[arm]}", *(f"{_at(first, share):.2f}" for share in (0.5, 0.95)),
            *(f"{1e3 * _at(between, share):.0f}" for share in (0.5, 0.95)),
            f"{memory[0]:.1f}" if memory else "", f"{max(row['server_mib'] for row in own.values()):,.0f}",
        ])  # fmt: skip
    head = [
        "over HTTP", "first token, s: p50", "p95", "between tokens, ms: p50", "p95", "MiB a client", "server's MiB",
    ]  # fmt: skip
    return [table(head, lines)] if lines else []


def _agreement(rows: list[Row]) -> list[str]:
    lines = []
    by_arm: dict[Key, list[int]] = {}
    for row in rows:
        if "agrees" in row:
            by_arm.setdefault((row["system"], row["agrees"]), []).extend(row["leading"])
    for (name, arm), leading in by_arm.items():
        lines.append([f"{name}, {TITLES[arm]}", _spread(leading, "{:.0f}"), f"{min(leading)}"])
    head = ["tokens that answers begin with as ours do", "median", "least"]
    changed = [row["changed"] for row in rows if "changed" in row]
    told = [f"The adapters change {min(changed)} to {max(changed)} of 16 answers."] if changed else []
    return [*([table(head, lines)] if lines else []), *told]


def _spread(values: list[float], shape: str = "{:.1f}") -> str:
    form: Callable[[float], str] = shape.format
    if len(values) < 2:
        return form(values[0]) if values else ""
    low, middle, high = quantiles(values, n=4)
    return f"{form(middle)} ({form(low)}–{form(high)})"


def _at(values: list[float], share: float) -> float:
    """The value that so many are not above; of sorted ones."""
    return values[min(len(values) - 1, int(share * len(values)))]
