"""A run as it was at one of its checkpoints: what was measured up to there, and that checkpoint's scores."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError
from topwork.reporting.readers import Record, RunFiles, number, read_json, read_metrics, scores_file

WHATEVER_STEP = (
    "parameters", "data", "system", "base_weights_bytes", "base_held_as", "checkpointed_layers", "shared_with",
    "planned_steps", "plan", "first_loss", "eval_loss_before",
)  # fmt: skip
"""Figures of result.json that do not depend on how far the run came."""


def up_to(run: RunFiles, place: Path, step: int) -> RunFiles:
    """The run up to a checkpoint, for its page."""
    problems = list(run.problems)
    records = tuple(record for record in run.records if record["step"] <= step)
    evaluation = read_json(place / scores_file(step), problems)
    result = {"stopped": f"checkpoint of step {step}"} | result_at(run.result, records, step)
    return replace(run, records=records, result=result, evaluation=evaluation, problems=tuple(problems))


def result_at(result: Mapping[str, Any], records: Sequence[Record], step: int) -> dict[str, Any]:
    """What result.json would have said then."""
    trained = [record for record in records if record["kind"] == "train" and record["step"] <= step]
    seconds, tokens = (sum(number(record, name) or 0.0 for record in trained) for name in ("seconds", "tokens"))
    passed = sum(number(record, "pass_tokens") or number(record, "tokens") or 0.0 for record in trained)
    found = {name: result[name] for name in WHATEVER_STEP if name in result} | {"steps": step}
    if trained:
        found |= {"seconds": round(seconds, 2), "tokens": int(tokens), "last_loss": number(trained[-1], "loss")}
    return found | ({"tokens_per_second": round(passed / seconds, 1)} if seconds else {})


def records_to(place: Path, step: int) -> list[Record]:
    """A run's measurements up to a step; none where they are not there."""
    try:
        return [record for record in read_metrics(place / "metrics.jsonl") if record["step"] <= step]
    except RequestError:
        return []
