"""What a sweep cost in time and memory, beside its members one by one: estimated, or measured by `--measure-alone`."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from topwork.recipe.recipe import Recipe, recipe_yaml
from topwork.reporting.readers import number, read_metrics
from topwork.run.folder import RECIPE, RESULT, read_json
from topwork.run.provenance import PROVENANCE
from topwork.run.sweep_book import Book

ALONE_STEPS = 8
"""Steps that a member trains alone; the first warms up and is not counted."""
BYTES_PER_TRAINED = 16
"""fp32 weight, gradient and AdamW's two moments."""


def pass_cost(book: Book, wave: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a wave's passes, each counted once, and the tokens of all its members in them."""
    before = max((other["stop_at"] or 0 for other in book.waves if other["rung"] < wave["rung"]), default=0)
    seconds, tokens = 0.0, 0.0
    for name in wave["members"]:
        steps = [record for record in book.records(name) if record["kind"] == "train" and record["step"] > before]
        seconds = max(seconds, sum(number(record, "seconds") or 0.0 for record in steps))
        tokens += sum(number(record, "tokens") or 0.0 for record in steps)
    peaks = [number(book.member(name), "result", "peak_memory_bytes") for name in wave["members"]]
    peak = max((peak for peak in peaks if peak is not None), default=None)
    return {"pass_seconds": round(seconds, 3), "pass_tokens": int(tokens), "peak_memory_bytes": peak and int(peak)}


def cost(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """Together against one by one. `one_by_one_*_estimate` follow from tokens at the pass's own speed, which small
    batches alone do not reach; `alone_seconds` from the speeds that were measured, where they were."""
    waves, members = sweep["waves"], sweep["members"]
    seconds = sum(wave.get("pass_seconds", 0.0) for wave in waves)
    tokens = sum(wave.get("pass_tokens", 0) for wave in waves)
    speed = tokens / seconds if seconds else None
    trained = {m["name"]: number(m, "result", "trained") or 0.0 for m in members}
    peak = number(waves[0], "peak_memory_bytes") if waves else None
    together = [trained[name] for name in waves[0]["members"]] if waves else []
    largest = peak - BYTES_PER_TRAINED * (sum(together) - max(together)) if peak is not None and together else None
    found = {
        "pass_seconds": round(seconds, 2),
        "tokens": tokens,
        "tokens_per_second": round(speed, 1) if speed else None,
        "peak_memory_bytes": peak,
        "largest_alone_bytes_estimate": largest,
        "base_weights_bytes": next((b for m in members if (b := number(m, "result", "base_weights_bytes"))), None),
        "members": len(members),
        "waves": len(waves),
        "one_by_one_seconds_estimate": round(seconds, 2) if speed else None,
    }
    return found | _measured(sweep, seconds)


def _measured(sweep: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """From speeds alone: tokens of each member by its own speed. Nothing where one of them has none."""
    alone = sweep.get("alone") or {}
    needed, peaks = [], []
    for member in sweep["members"]:
        speed, tokens = number(alone, member["point"], "tokens_per_second"), number(member, "result", "tokens")
        if tokens is None:
            continue  # diverged by itself: it trained together no further than alone
        if not speed:
            return {}
        needed.append(tokens / speed)
        peaks.append(number(alone, member["point"], "peak_memory_bytes") or 0.0)
    if not needed:
        return {}
    return {
        "alone_seconds": round(sum(needed), 2),
        "time_ratio": round(seconds / sum(needed), 4),
        "largest_alone_bytes": max(peaks),
        "alone_steps": ALONE_STEPS,
    }


def measure_alone(book: Book, recipes: Mapping[str, Recipe], report: Callable[[str], None]) -> None:
    """Train a member of each point alone for a few steps, in a process of its own, and write down speed and memory."""
    for name, recipe in recipes.items():
        point = book.member(name)["point"]
        if point in book.values["alone"]:
            continue
        report(f"{point} alone, for {ALONE_STEPS} steps")
        found = _alone(recipe, read_json(Path(recipe.output_dir) / PROVENANCE).get("tokens_per_pass"))
        if found is None:
            report(f"{point} alone came to no speed, so no ratio is told")
        book.values["alone"][point] = found
        book.save()


def _alone(recipe: Recipe, tokens_per_pass: int | None) -> dict[str, Any] | None:
    """Tokens per second after the first step, and the peak memory; None where it diverged at once."""
    with tempfile.TemporaryDirectory(prefix="topwork-alone-") as place:
        run = Path(place) / "run"
        training: dict[str, Any] = {
            "max_steps": ALONE_STEPS, "warmup_steps": 0, "tokens_per_pass": tokens_per_pass, "report_to": [],
            "logging_steps": 1, "eval_steps": ALONE_STEPS, "save_steps": ALONE_STEPS, "early_stopping_patience": None,
        }  # fmt: skip
        changed = recipe.model_copy(
            update={
                "output_dir": str(run),
                "training": recipe.training.model_copy(update=training),
                "data": recipe.data.model_copy(update={"eval": None, "eval_fraction": 0.0}),
            }
        )
        file = Path(place) / RECIPE
        file.write_text(recipe_yaml(changed), "utf-8")
        command = [sys.executable, "-m", "topwork", "train", str(file), "--json"]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        try:
            records = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"][1:]
        except ValueError:
            return None
        seconds = sum(number(record, "seconds") or 0.0 for record in records)
        if not seconds:
            return None
        tokens = sum(number(record, "tokens") or 0.0 for record in records)
        peak = read_json(run / RESULT).get("peak_memory_bytes")
        return {"tokens_per_second": round(tokens / seconds, 1), "peak_memory_bytes": peak, "steps": len(records)}
