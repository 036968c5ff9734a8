"""The summary of a check: its parts, the goals, and what to look at first, from the files that the parts left.

Free of torch, and content with whatever is there: a part may have ended at any line.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common import surroundings, surroundings_text, table

PACKAGES = ("triton", "flash_attn", "pydantic")
"""Beside those that every record names."""
SLOWEST, TOLD = 12, 15
"""Operations in the table, and lines of a part."""
MIB = 2**20
Found = dict[str, dict[str, Any]]


def machine() -> dict[str, Any]:
    """The card, its driver and memory as nvidia-smi has them, versions, the commit (or TOPWORK_COMMIT, where a copy has
    no history)."""
    around = surroundings()
    if around["commit"].startswith("unknown"):
        around["commit"] = os.environ.get("TOPWORK_COMMIT", "unknown")
    around["versions"] |= {name: found for name in PACKAGES if (found := installed(name))}
    return around | {"card": card()}


def card() -> str:
    """Name, driver and memory; "none" without one."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() or "none"


def installed(name: str) -> str | None:
    """A package's version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def as_markdown(record: dict[str, Any], out: Path) -> str:
    """For people; what is to be looked at first stands first."""
    found = {part["name"]: read(out / f"{part['name']}.json") for part in record["parts"]}
    parts = ["# Check on a card", told(record)]
    if record["tiny"]:
        parts.append("**Tiny shapes on a CPU, to try the script: no figure below is a measurement.**")
    parts.append(table(["part", "state", "seconds", "checks held"], list(states(record["parts"], found))))
    blocks = {
        "Wrong": wrong(record["parts"], found),
        "Told": "\n".join(f"- {name}: {line}" for name, own in found.items() for line in own.get("told", [])[:TOLD]),
        "Goals": goals({} if record["tiny"] else found),
        "Steps": steps(found),
        "Memory": memory(found),
        "The slowest operations by their ceilings": slowest(found),
        "Grouped products beside cuBLAS": grouped(found),
        "Generation": generation(found),
    }
    for heading, block in blocks.items():
        if block:
            parts += [f"## {heading}", block]
    return "\n\n".join(parts) + "\n"


def read(file: Path) -> dict[str, Any]:
    """What a part left; nothing where it left nothing."""
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def told(record: dict[str, Any]) -> str:
    """The machine."""
    around = record["machine"]
    return f"{around['card']}. {surroundings_text(around)}"


def states(parts: list[dict[str, Any]], found: Found) -> Iterator[list[str]]:
    """A line a part."""
    for part in parts:
        checks = found[part["name"]].get("checks", [])
        held = f"{sum(check['held'] for check in checks)} of {len(checks)}"
        yield [part["name"], part["state"], f"{part['seconds']:.0f} of {part['limit']:.0f}", held]


def wrong(parts: list[dict[str, Any]], found: Found) -> str:
    """What did not hold, sections that failed, and how a part ended that did not pass."""
    lines = []
    for part in parts:
        own = found[part["name"]]
        lines += [
            f"- {part['name']}: {check['name']}: {number(check['found'])}, at most {number(check['limit'])}"
            for check in own.get("checks", []) if not check["held"]
        ][:10]  # fmt: skip
        lines += [f"- {part['name']}: {name}: {error}" for name, error in own.get("failed", {}).items()][:10]
        if part["state"].startswith(("failed", "timed")):
            lines += [f"- {part['name']} ended so:", "", "```", *part["end"], "```"]
    return "\n".join(lines)


def goals(found: Found) -> str:
    """Measured beside what is aimed at."""
    rows = []

    def goal(name: str, aim: float, value: float | None, least: bool, unit: str = "") -> None:
        met = "not measured" if value is None else "met" if (value >= aim) == least or value == aim else "missed"
        sign = "≥" if least else "≤"
        rows.append([name, f"{sign} {aim:,g}{unit}", "" if value is None else f"{value:,.4g}{unit}", met])

    eight, six = found.get("llama8b", {}), found.get("adapters", {})
    lora, qlora, chats = (eight.get(name, {}) for name in ("lora", "qlora", "chats"))
    share = lora.get("share_of_datasheet", {}).get("least")
    speeds = [side.get("tokens_per_second") for side in (lora, qlora)]
    behind = 100 * (1 - speeds[1] / speeds[0]) if all(speeds) else None
    goal("8B, LoRA r16, bf16, sequences of 4,096: tokens/s", 16000, speeds[0], True)
    goal("the same, share of 989 TFLOP/s (least operations)", 54, None if share is None else 100 * share, True, " %")
    goal("8B, QLoRA NF4: slower than LoRA by", 5, behind, False, " %")
    goal("8B, chats: times as fast as PEFT + transformers", 3, chats.get("times_as_fast", {}).get("median"), True)
    for members in six.get("members") or [{"rows_each": "?"}]:
        name = f"six adapters in one pass over six alone, {members['rows_each']} rows each"
        goal(name, 0.6, members.get("together_over_alone"), False)
    return table(["goal", "aim", "measured", ""], rows)


def steps(found: Found) -> str:
    """Speeds, and what the profiler saw of a step."""
    rows = []
    for part, name in (("llama8b", "lora"), ("llama8b", "qlora")):
        own = found.get(part, {}).get(name)
        if own:
            seen = found[part].get(f"{name}_profile", {})
            shares = " and ".join(f"{100 * share:.1f}" for share in own["share_of_datasheet"].values())
            rows.append([
                f"8B {name}", f"{own['tokens_per_second']:,.0f}", shares, *(f"{seen.get(key, 0):,}" for key in (
                    "kernels", "launches", "stream_waits", "device_waits", "copies")),
                f"{100 * seen.get('idle_share', 0):.1f}",
            ])  # fmt: skip
    lines = [table(["step", "tokens/s", "% of 989 TFLOP/s: least, NeMo's", "kernels", "launches", "stream waits",
                    "device waits", "copies", "% idle"], rows)] if rows else []  # fmt: skip
    top = found.get("llama8b", {}).get("lora_profile", {}).get("top", [])
    lines += [table(["LoRA's most expensive kernels", "ms", "times", "%"], [
        [row["name"].replace("|", " ")[:70], f"{row['milliseconds']:.1f}", str(row["times"]),
         f"{100 * row['share']:.1f}"]
        for row in top
    ])] if top else []  # fmt: skip
    beside = [(part, found.get(part, {}).get("chats")) for part in ("smollm2", "llama8b")]
    rows = [
        [part, *(f"{own['tokens_per_second'][side]:,.0f}" for side in ("ours", "peer")),
         "{median:.2f} ({least:.2f}-{most:.2f})".format(**own["times_as_fast"]), f"{100 * own['padding']:.0f}",
         f"{own.get('peer_peak', 0) / MIB:,.0f}", f"{own['losses_apart']:.1e}"]
        for part, own in beside if own
    ]  # fmt: skip
    lines += [table(["chats", "tokens/s", "PEFT's", "times as fast", "% padding of PEFT's", "PEFT's peak, MiB",
                     "losses apart"], rows)] if rows else []  # fmt: skip
    return "\n\n".join(lines)


def memory(found: Found) -> str:
    """Bytes by part, and what was foreseen of them."""
    rows = []
    for name, own in found.get("memory", {}).items():
        if isinstance(own, dict) and "weights" in own:
            rows += [
                [f"{name}: {part}", f"{own[part]['foreseen'] / MIB:,.0f}", f"{own[part]['measured'] / MIB:,.0f}",
                 f"{own[part]['percent_more']:+.1f}"]
                for part in ("weights", "adapter_and_optimizer", "kept", "pass", "peak")
            ]  # fmt: skip
    return table(["part", "foreseen, MiB", "measured, MiB", "% more"], rows) if rows else ""


def slowest(found: Found) -> str:
    """The operations furthest from what the card can do."""
    own = sorted(found.get("kernels", {}).get("operations", []), key=lambda row: finite(row["of_ceiling"]))
    rows = [
        [row["name"], f"{row['microseconds']:,.0f}", f"{row['bytes_per_second'] / 1e9:,.0f}",
         f"{row['flops_per_second'] / 1e12:,.0f}", f"{100 * finite(row['of_ceiling']):.0f}",
         f"{len(row['kernels'])}: {', '.join(dict.fromkeys(row['kernels']))}"[:60].replace("|", " ")]
        for row in own[:SLOWEST]
    ]  # fmt: skip
    best = found.get("kernels", {}).get("ceilings")
    if not rows or not best:
        return ""
    said = (
        f"A large copy moves {best['copy_bytes_per_second'] / 1e9:,.0f} GB/s, a product of 8192³ in bf16 runs at "
        f"{best['product_flops_per_second'] / 1e12:,.0f} TFLOP/s."
    )
    return f"{said}\n\n" + table(["operation", "µs", "GB/s", "TFLOP/s", "% of ceiling", "kernels"], rows)


def grouped(found: Found) -> str:
    """Our kernel's time over cuBLAS's, by stage and by members: more than 1 is slower."""
    own = found.get("kernels", {}).get("grouped", [])
    stages = list(dict.fromkeys(row["stage"] for row in own))
    names = list(dict.fromkeys(row["name"] for row in own))
    by = {(row["name"], row["stage"]): row["ours_microseconds"] / row["cublas_microseconds"] for row in own}
    rows = [[name, *(f"{by[name, stage]:.2f}" if (name, stage) in by else "" for stage in stages)] for name in names]
    return table(["time over cuBLAS's", *stages], rows) if rows else ""


def generation(found: Found) -> str:
    """Tokens a second."""
    own = found.get("adapters", {}).get("generation", [])
    widths = sorted({row["sequences"] for row in own})
    by = {(row["who"], row["sequences"]): row["tokens_per_second"] for row in own}
    names = list(dict.fromkeys(row["who"] for row in own))
    rows = [[name, *(f"{by[name, width]:,.0f}" if (name, width) in by else "" for width in widths)] for name in names]
    return table(["tokens/s of sequences", *map(str, widths)], rows) if rows else ""


def number(value: Any) -> str:
    """A figure, or what stands in its place."""
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)


def finite(value: Any) -> float:
    """A share that could not be had counts as the worst."""
    return value if isinstance(value, int | float) else 0.0
