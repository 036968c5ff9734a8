"""`topwork train`: where all parts meet."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, read_adapter, write_adapter
from topwork.common.devices import free_memory_bytes, peak_memory_bytes
from topwork.common.errors import RequestError
from topwork.common.files import (
    clear_leftovers,
    recover_folder,
    verify_folder,
    write_folder,
    write_json,
    write_text,
)
from topwork.data.examples import Data, load_data
from topwork.models.base import Base, load_base
from topwork.models.checkpointing import checkpoint_layers, decoder_layers
from topwork.models.recognise import is_fast
from topwork.plan.count import ParameterCount, count_adapter
from topwork.quantization.linear import packed_kinds, weight_bytes
from topwork.recipe.recipe import Recipe, load_recipe, recipe_yaml
from topwork.run.folder import (
    ADAPTER,
    ADAPTER_NAME,
    EVALUATION,
    RECIPE,
    RESULT,
    TEMPLATE,
    TRIAL,
    check_place,
    read_json,
    read_recipe,
)
from topwork.run.provenance import PROVENANCE, provenance, record, refuse_other_inputs
from topwork.training.checkpoint import ADAPTER as CHECKPOINT_ADAPTER
from topwork.training.checkpoint import checkpoint_path, checkpoint_step, newest_whole_checkpoint
from topwork.training.loop import CHECKPOINTS, Loop, Outcome
from topwork.training.metrics import METRICS, MetricsLog, check_sinks, open_sinks
from topwork.training.objective import OBJECTIVES
from topwork.training.passes import Memory, PassPlan, plan_passes
from topwork.training.progress import Progress, Silent

FREE_TO_CHANGE = {
    "output_dir", "training.tokens_per_pass", "training.activation_checkpointing", "training.report_to",
    "training.logging_steps", "training.save_total_limit", "training.save_steps", "model.device",
    "model.model_name_or_path", "data.train", "data.eval", "data.chat_template",
}  # fmt: skip
"""What may differ when a run is resumed; anything else would make it another run. Files may have moved: whether they
are the same is told by their hashes (`run/provenance.py`)."""


@dataclass(frozen=True)
class TrainedRun:
    """A run's folder and its figures, as in result.json."""

    folder: Path
    result: dict[str, Any]


def train(
    recipe: Recipe | Path | str,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    report: Callable[[str], None] = print,
) -> TrainedRun:
    """Train the adapter that a recipe describes; the result is in `output_dir`.

    `resume` goes on from the newest whole checkpoint, or starts where there is none. Raises RequestError where
    something is wrong with the request (nothing is written then), RunError where the run fails.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe), overrides)
    folder = Path(recipe.output_dir)
    check_sinks(recipe.training.report_to)
    _check_folder(folder, recipe, resume, overwrite)
    sinks_config = recipe.model_dump(mode="json")
    base = load_base(recipe.model, report, recipe.quantization)
    weights = weight_bytes(base.module)
    report(f"base weights: {weights / 2**20:,.0f} MiB, {_held_as(base)}")
    data = load_data(recipe.data, base.tokenizer, base.context_length, recipe.training.seed, report)
    adapters = Adapters(base.module)
    adapters.add(ADAPTER_NAME, recipe.adapter, recipe.training.seed)
    counted = count_adapter(base.module, recipe.adapter)
    report(f"{base.name}: {counted.trainable:,} of {counted.total:,} parameters are trained ({counted.share:.2%})")
    plan = _planned_passes(recipe, base, data, folder if resume else None, report)
    checkpoint_layers(base, plan.checkpointed_layers, (ADAPTER_NAME,))

    if resume:
        recover_folder(folder / ADAPTER)
    checkpoint = newest_whole_checkpoint(folder / CHECKPOINTS, report) if resume else None
    origin = provenance(recipe, base, data, plan.tokens_per_pass)
    if resume:
        refuse_other_inputs(folder, origin)
    if overwrite:
        _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RECIPE, recipe_yaml(recipe))
    if data.template.jinja:
        write_text(folder / TEMPLATE, data.template.jinja)
    record(folder, origin, base)
    at = checkpoint_step(checkpoint) if checkpoint else None
    with MetricsLog(folder, at, open_sinks(recipe.training.report_to, folder, sinks_config, at), report) as metrics:
        loop = Loop(
            base, adapters, ADAPTER_NAME, OBJECTIVES[recipe.training.objective](), recipe.training, data.train,
            data.eval, plan.tokens_per_pass, folder, metrics, progress or Silent(),
        )  # fmt: skip
        state = loop.resume(checkpoint) if checkpoint else None
        if checkpoint:
            report(f"going on from {checkpoint}")
        outcome = loop.run(state)
    if outcome.stopped != "interrupted":
        _keep_best(recipe, folder, adapters, base, outcome)
    result = _result(recipe, folder, base, data, counted, outcome)
    held = {"base_weights_bytes": weights, "base_held_as": _held_as(base)}
    result |= held | {"checkpointed_layers": plan.checkpointed_layers}
    write_json(folder / RESULT, result)
    return TrainedRun(folder, result)


def _check_folder(folder: Path, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise RequestError("--resume goes on with a run and --overwrite deletes it; give one of the two")
    check_place(folder, "output_dir")
    clear_leftovers(folder)
    if not (folder / RECIPE).exists():
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise RequestError(f"output_dir {folder} holds other files; give an empty or a new folder")
        return
    if resume:
        before, now = (_flat(r.model_dump(mode="json")) for r in (read_recipe(folder), recipe))
        changed = [
            key for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in FREE_TO_CHANGE and not key.startswith("evaluation.")
        ]  # fmt: skip
        if changed:
            told = "; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed[:5])
            raise RequestError(f"{folder} was begun with another recipe ({told}). Resume with the same, or start anew")
    elif not overwrite:
        raise RequestError(
            f"output_dir {folder} holds a run already; go on with it by --resume, replace it by --overwrite, or name "
            "another output_dir"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by dotted name; a section's own maps and lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and not prefix:
            flat |= _flat(value, f"{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _planned_passes(
    recipe: Recipe, base: Base, data: Data, resumed: Path | None, report: Callable[[str], None]
) -> PassPlan:
    """Tokens per pass as asked, as the run began with, or from free memory; and the layers that are checkpointed."""
    asked, checkpointing = recipe.training.tokens_per_pass, recipe.training.activation_checkpointing
    if asked is None and resumed is not None:
        asked = read_json(resumed / PROVENANCE).get("tokens_per_pass")
    longest = max(len(example.tokens) for example in (*data.train, *data.eval))
    layers = len(decoder_layers(base.module))
    free, dropout = free_memory_bytes(base.device), recipe.adapter.lora_dropout > 0
    memory = Memory(base.module.config, base.device, free, layers, dropout, is_fast(base.module))
    plan = plan_passes(asked, checkpointing, longest, memory)
    if asked is None:
        report(
            f"tokens per pass: {plan.tokens_per_pass:,}, from free memory; set training.tokens_per_pass to repeat a "
            "run to the bit"
        )
    if plan.checkpointed_layers:
        why = ", from free memory" if checkpointing == "auto" else ""
        report(f"activation checkpointing: {plan.checkpointed_layers} of {layers} layers{why}")
    return plan


def _held_as(base: Base) -> str:
    """In which types the frozen base is held."""
    dense = str(base.module.dtype).removeprefix("torch.")
    kinds = [f"{count} layers in {kind}" for kind, count in packed_kinds(base.module).items()]
    return ", ".join([*kinds, f"the rest in {dense}"]) if kinds else f"in {dense}"


def _clear(folder: Path) -> None:
    """Take an earlier run out of its folder."""
    for stale in (CHECKPOINTS, ADAPTER, "report", "tensorboard"):
        shutil.rmtree(folder / stale, ignore_errors=True)
    for stale in (METRICS, RESULT, EVALUATION, TRIAL, "merge.json", PROVENANCE, TEMPLATE, "wandb_id"):
        (folder / stale).unlink(missing_ok=True)


def _keep_best(recipe: Recipe, folder: Path, adapters: Adapters, base: Base, outcome: Outcome) -> None:
    """The run's adapter: the best validation's where asked for, else the last step's."""
    best = outcome.state.best_step
    if recipe.training.load_best_model_at_end and best not in (None, outcome.state.step):
        saved = checkpoint_path(folder / CHECKPOINTS, best)
        verify_folder(saved)
        adapters.load(ADAPTER_NAME, read_adapter(saved / CHECKPOINT_ADAPTER).tensors)
    write_folder(
        folder / ADAPTER,
        lambda path: write_adapter(path, adapters, ADAPTER_NAME, BaseId(base.name, base.fingerprint)),
        replace=True,
    )


def _result(
    recipe: Recipe, folder: Path, base: Base, data: Data, counted: ParameterCount, outcome: Outcome
) -> dict[str, Any]:
    records = [json.loads(line) for line in (folder / METRICS).read_text("utf-8").splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    seconds = sum(record["seconds"] for record in trained)
    tokens = sum(record["tokens"] for record in trained)
    history = outcome.state.history
    return {
        "stopped": outcome.stopped,
        "steps": outcome.state.step,
        "planned_steps": outcome.steps,
        "seconds": round(seconds, 2),
        "tokens": outcome.state.tokens_seen,
        "learned_tokens": sum(record["learned_tokens"] for record in trained),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "peak_memory_bytes": peak_memory_bytes(base.device),
        "first_loss": trained[0]["loss"] if trained else None,
        "last_loss": trained[-1]["loss"] if trained else None,
        "eval_loss_before": history[0].eval_loss if history else None,
        "eval_loss_after": outcome.state.best_loss if recipe.training.load_best_model_at_end else _last(history),
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


def _summary(data: Data) -> dict[str, str]:
    """The data's lines by what they are about, for the report."""
    recognised, *lines = data.summary.lines()
    parts = [line.partition(": ") for line in lines]
    return {"recognised": recognised, **{head: rest for head, _, rest in parts}}


def _last(history: Sequence[Any]) -> float | None:
    return history[-1].eval_loss if history else None


def _common_system(data: Data) -> str | None:
    """The system message that every row has, so that a chat can begin as training did."""
    systems = {
        row.messages[0].content if row.messages and row.messages[0].role == "system" else None
        for row in data.train_conversations
    }
    return systems.pop() if len(systems) == 1 else None
