"""What a sweep cost in time and memory, beside its trials one by one: estimated, or measured by `--measure-alone`."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from topwork.recipe.recipe import Recipe, recipe_yaml
from topwork.reporting.readers import number, read_metrics
from topwork.reporting.sweep_state import AloneSpeed, Cost, SweepState, Wave, trial_metrics
from topwork.run.folder import RECIPE, RESULT, read_json
from topwork.run.provenance import PROVENANCE

ALONE_STEPS = 8
"""Steps that a trial trains alone; the first warms up and is not counted."""
BYTES_PER_TRAINED = 16
"""fp32 weight, gradient and AdamW's two moments."""


def take_pass_cost(folder: Path, sweep: SweepState, wave: Wave) -> None:
    """Seconds of a wave's passes, each counted once, and the tokens of all its trials in them."""
    before = max((other.stop_at or 0 for other in sweep.waves if other.rung < wave.rung), default=0)
    trials = [sweep.trial(name) for name in wave.names]
    seconds, tokens = 0.0, 0.0
    for trial in trials:
        records = trial_metrics(folder, trial)
        steps = [record for record in records if record["kind"] == "train" and record["step"] > before]
        seconds = max(seconds, sum(number(record, "seconds") or 0.0 for record in steps))
        tokens += sum(number(record, "tokens") or 0.0 for record in steps)
    wave.pass_seconds, wave.pass_tokens = round(seconds, 3), int(tokens)
    wave.peak_memory_bytes = max((trial.result.peak_memory_bytes for trial in trials if trial.result), default=None)


def cost(sweep: SweepState) -> Cost:
    """Together against one by one. `one_by_one_*_estimate` follow from tokens at the pass's own speed, which small
    batches alone do not reach; `alone_seconds` from the speeds that were measured, where they were."""
    waves, results = sweep.waves, {trial.name: trial.result for trial in sweep.trials}
    seconds = sum(wave.pass_seconds or 0.0 for wave in waves)
    tokens = sum(wave.pass_tokens or 0 for wave in waves)
    speed = tokens / seconds if seconds else None
    peak = waves[0].peak_memory_bytes if waves else None
    together = [result.trained if (result := results[name]) else 0 for name in waves[0].names] if waves else []
    largest = peak - BYTES_PER_TRAINED * (sum(together) - max(together)) if peak is not None and together else None
    found = Cost(
        pass_seconds=round(seconds, 2),
        tokens=tokens,
        tokens_per_second=round(speed, 1) if speed else None,
        peak_memory_bytes=peak,
        largest_alone_bytes_estimate=largest,
        base_weights_bytes=next((result.base_weights_bytes for result in results.values() if result), None),
        trials=len(sweep.trials),
        waves=len(waves),
        one_by_one_seconds_estimate=round(seconds, 2) if speed else None,
    )
    _take_measured(found, sweep, seconds)
    return found


def _take_measured(found: Cost, sweep: SweepState, seconds: float) -> None:
    """From speeds alone: tokens of each trial by its own speed. Nothing where one of them has none."""
    needed, peaks = [], []
    for trial in sweep.trials:
        if trial.result is None:
            continue  # diverged by itself: it trained together no further than alone
        alone = sweep.alone.get(trial.point)
        if alone is None or not alone.tokens_per_second:
            return
        needed.append(trial.result.tokens / alone.tokens_per_second)
        peaks.append(alone.peak_memory_bytes or 0)
    if not needed:
        return
    found.alone_seconds = round(sum(needed), 2)
    found.time_ratio = round(seconds / sum(needed), 4)
    found.largest_alone_bytes = max(peaks)
    found.alone_steps = ALONE_STEPS


def measure_alone(folder: Path, sweep: SweepState, recipes: Mapping[str, Recipe], log: Callable[[str], None]) -> None:
    """Train a trial of each point alone for a few steps, in a process of its own, and write down speed and memory."""
    for trial in sweep.trials:
        if trial.point in sweep.alone:
            continue
        log(f"{trial.point} alone, for {ALONE_STEPS} steps")
        recipe = recipes[trial.name]
        found = _alone(recipe, read_json(Path(recipe.output_dir) / PROVENANCE).get("tokens_per_pass"))
        if found is None:
            log(f"{trial.point} alone came to no speed, so no ratio is told")
        sweep.alone[trial.point] = found
        sweep.save(folder)


def _alone(recipe: Recipe, tokens_per_pass: int | None) -> AloneSpeed | None:
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
        return AloneSpeed(
            tokens_per_second=round(tokens / seconds, 1),
            peak_memory_bytes=read_json(run / RESULT).get("peak_memory_bytes"),
            steps=len(records),
        )
