"""A sweep's state (`reporting/sweep_state.py`) as it begins, goes on, and takes what its trials came to."""

import json
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from topwork.adapters.config import CONFIGS
from topwork.common.errors import RequestError
from topwork.common.locks import leave
from topwork.recipe.recipe import Recipe
from topwork.recipe.sweep_config import PlannedTrial
from topwork.reporting.readers import number
from topwork.reporting.sweep import picture_names
from topwork.reporting.sweep_state import (
    PICTURES,
    REPORTS,
    SWEEP,
    Rungs,
    SweepState,
    TrialRecord,
    TrialResult,
    TrialScores,
    TrialState,
    read_sweep,
    trial_metrics,
)
from topwork.run.begin import check_replaceable, holds_others
from topwork.run.ownership import is_run, nothing_begun, take_away
from topwork.run.sweep.plan import SweepPlan

IDLE = {
    "tokens_per_pass", "activation_checkpointing", "threads", "logging_steps", "save_steps", "save_total_limit",
    "report_to",
}  # fmt: skip
"""Training options that do not change what a trial is."""


def open_state(plan: SweepPlan, resume: bool, overwrite: bool) -> SweepState:
    """The state of a sweep that begins, or goes on with `resume`; nothing is written yet.

    Raises RequestError where the folder holds something else, a sweep that neither `resume` nor `overwrite` was asked
    for, one that cannot be read or with other trials, or none to resume. It is held by this process.
    """
    if resume and overwrite:
        raise RequestError("--resume goes on with a sweep and --overwrite deletes it; give one of the two")
    folder, file = plan.out, plan.out / SWEEP
    if file.is_file() and not resume and not overwrite:
        raise RequestError(
            f"output_dir {folder} holds a sweep already; go on with it by --resume, replace it by --overwrite, or name "
            "another with --set output_dir=…"
        )
    if not file.is_file() and _holds_others(plan):
        raise RequestError(
            f"output_dir {folder} holds other files; name an empty or a new folder by --set output_dir=…"
        )
    fresh = _fresh(plan)
    if not file.is_file():
        if resume:
            raise nothing_begun(folder, "sweep", lambda path: (path / SWEEP).is_file())
        return fresh
    known = read_sweep(folder)
    if resume:
        _refuse_another(folder, known, fresh)
    else:
        for run in earlier_runs(folder):
            check_replaceable(run)
    return known if resume else fresh


def earlier_runs(folder: Path) -> list[Path]:
    """The runs that an earlier sweep made in its folder."""
    if not (folder / SWEEP).is_file():
        return []
    runs = [folder / trial.folder for trial in read_sweep(folder).trials]
    return [run for run in runs if run.resolve().parent == folder.resolve() and is_run(run)]


def clear(folder: Path) -> None:
    """Take an earlier sweep out of its folder: its files, and the runs in it that it made. All of them are held."""
    for run in earlier_runs(folder):
        if take_away(run):
            leave(run)
    if not (folder / SWEEP).is_file():
        return
    for name in (*picture_names(read_sweep(folder)), *REPORTS, SWEEP):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # something of its owner is in there, or it is not there
        (folder / PICTURES).rmdir()


def discard(folder: Path) -> None:
    """Take back a sweep of which nothing was begun."""
    (folder / SWEEP).unlink(missing_ok=True)


def _holds_others(plan: SweepPlan) -> bool:
    """Whether it holds anything but hidden files, and folders made for trials that nothing came into."""
    made = {Path(trial.recipe.output_dir).resolve() for trial in plan.trials}
    seen = [path for path in (plan.out.iterdir() if plan.out.is_dir() else ()) if not path.name.startswith(".")]
    return any(path.resolve() not in made or holds_others(path) for path in seen)


def result_of(folder: Path, trial: TrialRecord, result: Mapping[str, Any]) -> TrialResult:
    """What training gave: of result.json, and the last validation loss of the trial's metrics."""
    kept = {name: result[name] for name in TrialResult.model_fields if name in result}
    validated = [number(record, "loss") for record in trial_metrics(folder, trial) if record["kind"] == "eval"]
    kept |= {"trained": result["parameters"]["trainable"], "last_eval_loss": validated[-1] if validated else None}
    return TrialResult.model_validate(kept)


def take_scores(trial: TrialRecord, scored: Mapping[str, Any], on_validation: bool) -> None:
    """What the answers were worth, with the adapter and before, of evaluation.json."""
    rows = {name: scored[name] for name in ("rows", "grader", "data")}
    after, before = (
        TrialScores.model_validate({name: arm[name] for name in TrialScores.model_fields if name in arm} | rows)
        for arm in (scored["after"], scored["before"])
    )
    trial.scores, trial.before, trial.on_validation = after, before, on_validation


def recipe_hash(recipe: Recipe) -> str:
    """What makes a trial what it is; files may have moved (their hashes stand in provenance.json)."""
    values = recipe.model_dump(mode="json")
    adapter = {**_every_option(), **values["adapter"]}  # as the first sweeps wrote it down
    for key in ("rank_pattern", "alpha_pattern"):
        if list(adapter[key]) != sorted(adapter[key]):  # of which the first that matches counts
            adapter[key] = list(adapter[key].items())
    if adapter["init_from"] is None:
        del adapter["init_from"]
    told = {
        "adapter": adapter,
        "quantization": values["quantization"],
        "evaluation": {key: value for key, value in values["evaluation"].items() if key != "data"},
        "training": {key: value for key, value in values["training"].items() if key not in IDLE},
        "data": {key: value for key, value in values["data"].items() if key not in ("train", "eval", "chat_template")},
    }
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _every_option() -> dict[str, Any]:
    """The adapter options of all methods, as they are where nobody names them."""
    return {key: value for config in CONFIGS.values() for key, value in config().model_dump(mode="json").items()}


def _fresh(plan: SweepPlan) -> SweepState:
    ready, halving = plan.ready, plan.halving
    return SweepState(
        format=1,
        name=plan.out.name,
        model=plan.trials[0].recipe.model.model_name_or_path,
        preset=ready.name if ready else None,
        text=ready.text if ready else None,
        left_out=list(ready.left_out) if ready else [],
        jobs=plan.jobs,
        axes=plan.axes,
        halving=Rungs(factor=halving.factor, rungs=halving.rungs, stops=list(plan.stops)) if halving else None,
        trials=[_waiting(plan.out, trial) for trial in plan.trials],
        waves=[],
        alone={},
    )


def _waiting(out: Path, trial: PlannedTrial) -> TrialRecord:
    folder = Path(trial.recipe.output_dir)
    inside = folder.resolve().is_relative_to(out.resolve())
    return TrialRecord(
        name=trial.name,
        folder=str(folder.resolve().relative_to(out.resolve()) if inside else folder.resolve()),
        point=trial.point,
        values=trial.values,
        seed=trial.recipe.training.seed,
        recipe=recipe_hash(trial.recipe),
        state=TrialState.WAITING,
        rung=None,
        left_at=None,
        result=None,
        scores=None,
        before=None,
        on_validation=None,
    )


def _refuse_another(folder: Path, known: SweepState, planned: SweepState) -> None:
    before = {trial.name: trial.recipe for trial in known.trials}
    now = {trial.name: trial.recipe for trial in planned.trials}
    changed = [name for name in now if name in before and before[name] != now[name]]
    other = sorted(before.keys() ^ now.keys())
    halving = known.halving != planned.halving
    if other or changed or halving:
        told = [f"{len(other)} members are in one of the two only (first {other[0]})"] if other else []
        told += [f"{len(changed)} have other options (first {changed[0]})"] if changed else []
        told += ["halving is not the same"] if halving else []
        raise RequestError(
            f"{folder} was begun with another sweep: {'; '.join(told)}. Resume with the same, or begin anew in "
            "another output_dir"
        )
