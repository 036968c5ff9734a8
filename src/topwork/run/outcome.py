"""What a run leaves when it stops: its adapter, and its figures in result.json."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topwork.adapters.peft_format import read_adapter, write_adapter
from topwork.common.devices import peak_memory_bytes
from topwork.common.files import remove_folder, verify_folder, write_folder
from topwork.data.examples import Data
from topwork.models.base import Base
from topwork.plan.count import ParameterCount
from topwork.run.folder import ADAPTER
from topwork.training.checkpoint import ADAPTER as CHECKPOINT_ADAPTER
from topwork.training.checkpoint import checkpoint_path
from topwork.training.config import TrainingConfig
from topwork.training.loop import Outcome
from topwork.training.metrics import METRICS
from topwork.training.trial import CHECKPOINTS, Place


@dataclass(frozen=True)
class TrainedRun:
    """A run's folder and its figures, as in result.json. `name` is the adapter's in the base it was trained on."""

    folder: Path
    result: dict[str, Any]
    name: str = "default"


def keep_adapter(
    place: Place, config: TrainingConfig, outcome: Outcome, beside: Callable[[Path], None] = lambda _: None
) -> None:  # fmt: skip
    """The run's adapter: the best validation's where asked for, else the last step's; and what is written `beside` it.
    One that was interrupted has none yet, and one that diverged has none."""
    target = place.run_dir / ADAPTER
    if outcome.stopped == "interrupted":
        return
    if outcome.stopped == "diverged":
        if target.is_dir():
            remove_folder(target)
        return
    best = outcome.state.best_step
    if config.load_best_model_at_end and best is not None and best != outcome.state.step:
        saved = checkpoint_path(place.run_dir / CHECKPOINTS, best)
        verify_folder(saved)
        place.adapters.load(place.name, read_adapter(saved / CHECKPOINT_ADAPTER, place.adapters.methods).tensors)

    def fill(folder: Path) -> None:
        write_adapter(folder, place.adapters, place.name, place.base_id)
        beside(folder)

    write_folder(target, fill, replace=True)


def figures(
    folder: Path, config: TrainingConfig, base: Base, data: Data, counted: ParameterCount, outcome: Outcome
) -> dict[str, Any]:
    """What result.json says of one adapter. Seconds and tokens_per_second are those of the passes it shared."""
    records = [json.loads(line) for line in (folder / METRICS).read_text("utf-8").splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    seconds = sum(record["seconds"] for record in trained)
    passed = sum(record.get("pass_tokens", record["tokens"]) for record in trained)
    history = outcome.state.history
    before = history[0].eval_loss if history else None
    after = outcome.state.best_loss if config.load_best_model_at_end else _last(history)
    return {
        "stopped": outcome.stopped,
        "steps": outcome.state.step,
        "planned_steps": outcome.steps,
        "seconds": round(seconds, 2),
        "tokens": outcome.state.tokens_seen,
        "learned_tokens": sum(record["learned_tokens"] for record in trained),
        "tokens_per_second": round(passed / seconds, 1) if seconds else None,
        "peak_memory_bytes": peak_memory_bytes(base.device),
        "first_loss": trained[0]["loss"] if trained else None,
        "last_loss": trained[-1]["loss"] if trained else None,
        "eval_loss_before": before,
        "eval_loss_after": after,
        "better_than_base": None if before is None or after is None or len(history) < 2 else after < before,
        "best_step": outcome.state.best_step,
        "best_eval_loss": outcome.state.best_loss,
        "parameters": {
            "trainable": counted.trainable,
            "frozen": counted.frozen,
            "total": counted.total,
            "share": counted.share,
            "by_module": [
                {"name": part.name, "modules": part.modules, "trainable": part.trainable} for part in counted.by_module
            ],
        },
        "data": _summary(data),
        "system": _common_system(data),
        "warnings": [record["text"] for record in records if record["kind"] == "note"],
    }


def _summary(data: Data) -> dict[str, Any]:
    """The data's lines by what they are about, for the report."""
    summary = data.summary
    sides = {name: counts.line(name).removeprefix(f"{name}: ") for name, counts in summary.sides.items()}
    return {"recognised": summary.recognised, **sides, "notes": [note.line() for note in summary.told()]}


def _last(history: Sequence[Any]) -> float | None:
    return history[-1].eval_loss if history else None


def _common_system(data: Data) -> str | None:
    """The system message that every row has, so that a chat can begin as training did."""
    systems = {
        row.messages[0].content if row.messages and row.messages[0].role == "system" else None
        for row in data.train_conversations
    }
    return systems.pop() if len(systems) == 1 else None
