"""A run that diverges raises, and leaves a result.json that says so: a report of it can be made, and others know."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from topwork.common.errors import NonFiniteLossError
from topwork.common.files import write_json
from topwork.recipe.recipe import Recipe
from topwork.run.folder import RESULT
from topwork.run.ownership import is_run, own
from topwork.training.metrics import DIVERGED, METRICS


def record_divergence(recipes: Sequence[Recipe], error: BaseException) -> None:
    """Write the only run's figures up to where it diverged, from its metrics; nothing for any other error."""
    folder = Path(recipes[0].output_dir)
    if len(recipes) > 1 or not isinstance(error, NonFiniteLossError) or not (folder / METRICS).is_file():
        return
    records = [json.loads(line) for line in (folder / METRICS).read_text("utf-8").splitlines()]
    told = [record for record in records if record["kind"] == "note"]
    if not told or not told[-1]["text"].startswith(DIVERGED):
        return
    if is_run(folder):
        own(folder, RESULT)
    write_json(folder / RESULT, _figures(records, str(error)))


def _figures(records: Sequence[dict[str, Any]], why: str) -> dict[str, Any]:
    trained = [record for record in records if record["kind"] == "train"]
    validated = [record for record in records if record["kind"] == "eval"]
    seconds = sum(record["seconds"] for record in trained)
    return {
        "stopped": "diverged",
        "reason": why,
        "steps": records[-1]["step"],
        "seconds": round(seconds, 2),
        "first_loss": trained[0]["loss"] if trained else None,
        "last_loss": trained[-1]["loss"] if trained else None,
        "eval_loss_before": validated[0]["loss"] if validated and validated[0]["step"] == 0 else None,
        "eval_loss_after": validated[-1]["loss"] if validated and validated[-1]["step"] else None,
        "warnings": [record["text"] for record in records if record["kind"] == "note"],
    }
