"""Which of a run's adapters is meant: the finished one, or the one of a checkpoint.

The run may be another process's and train on: its checkpoints come and go while they are read, and nothing of it is
written to.
"""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topwork.adapters.peft_format import SavedAdapter, read_adapter
from topwork.common.errors import AdapterError, CheckpointError, RequestError
from topwork.common.files import verify_folder
from topwork.common.os_errors import check_link
from topwork.data.batches import steps_per_epoch
from topwork.recipe.recipe import Recipe
from topwork.reporting.readers import number, read_json, section
from topwork.run.folder import ADAPTER, RECIPE, RESULT
from topwork.run.provenance import PROVENANCE
from topwork.training.checkpoint import ADAPTER as INNER
from topwork.training.checkpoint import (
    TrainState,
    checkpoint_path,
    checkpoint_step,
    list_checkpoints,
    read_state,
)
from topwork.training.schedule import planned_steps
from topwork.training.trial import CHECKPOINTS

BEST, LAST = "best", "last"
_STEP = re.compile(r"(?:step-)?(\d+)")
Log = Callable[[str], None]


@dataclass(frozen=True)
class Chosen:
    """An adapter that was read whole. `state` is how far its run was; None for the finished adapter."""

    folder: Path
    saved: SavedAdapter
    state: TrainState | None = None

    @property
    def checkpoint(self) -> int | None:
        """The step of its checkpoint."""
        return self.state.step if self.state is not None else None


def choose(run: Path, recipe: Recipe, checkpoint: str | int | None, log: Log) -> Chosen:
    """The adapter of a run's `checkpoint`: a step, `best` (the lowest validation loss) or `last` (the newest that is
    whole). None is the finished adapter, and where there is none yet the newest checkpoint's, which `log` is told.

    Raises RequestError for a checkpoint that is not there, with those that are, CheckpointError for one that is not
    whole, AdapterError for an adapter that cannot be read.
    """
    wanted = _wanted(checkpoint)
    if wanted is None:
        check_link(run / ADAPTER)
    if wanted is None and (run / ADAPTER).is_dir():
        return Chosen(run / ADAPTER, read_adapter(run / ADAPTER))
    if wanted == BEST:
        return _best(run, log)
    if isinstance(wanted, int):
        return _at(run, wanted)
    newest = _newest(run, log)
    if newest is None:
        raise RequestError(_without_checkpoint(run))
    if wanted is None:
        _refuse_diverged(run, newest)
        log(_told(run, recipe, newest))
    return newest


def planned(run: Path, recipe: Recipe) -> int | None:
    """Of how many steps a run is; None where nothing tells it."""
    known = number(_read_known(run, RESULT), "planned_steps") or recipe.training.max_steps
    rows = number(section(_read_known(run, PROVENANCE), "data", "train"), "rows")
    if known is None and rows:
        known = planned_steps(recipe.training, steps_per_epoch(int(rows), recipe.training.batch_size))
    return int(known) if known is not None else None


def stop_of(run: Path, step: int) -> int | None:
    """After which step a run was stopped; None where it was not, and where it has gone on to `step` since."""
    result = _read_known(run, RESULT)
    stopped = number(result, "steps") if result.get("stopped") == "interrupted" else None
    return int(stopped) if stopped is not None and stopped >= step else None


def _wanted(checkpoint: str | int | None) -> str | int | None:
    if checkpoint is None or checkpoint in (BEST, LAST):
        return checkpoint
    named = _STEP.fullmatch(str(checkpoint).strip())
    if named is None:
        raise RequestError(f"--checkpoint {checkpoint}: expected the step of a checkpoint, {BEST} or {LAST}")
    return int(named.group(1))


def _read(path: Path) -> Chosen:
    """Raises CheckpointError or AdapterError, also where it goes away meanwhile."""
    try:
        verify_folder(path)
        return Chosen(path / INNER, read_adapter(path / INNER), read_state(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error


def _at(run: Path, step: int) -> Chosen:
    path = checkpoint_path(run / CHECKPOINTS, step)
    try:
        return _read(path)
    except (CheckpointError, AdapterError) as error:
        if path.is_dir():
            raise
        raise RequestError(f"--checkpoint {step}: {run} has no checkpoint of that step; {_there(run)}") from error


def _newest(run: Path, log: Log) -> Chosen | None:
    """None where there is none that is whole. A run that trains on deletes what has been listed: it is listed again."""
    seen: list[Path] | None = None
    told: set[Path] = set()
    while (kept := list_checkpoints(run / CHECKPOINTS)) != seen:
        seen = kept
        for path in reversed(kept):
            try:
                return _read(path)
            except (CheckpointError, AdapterError) as error:
                if path.is_dir() and path not in told:
                    told.add(path)
                    log(f"checkpoint {path.name} is passed over for the one before: {error}")
    return None


def _best(run: Path, log: Log) -> Chosen:
    before: int | None = None
    while (newest := _newest(run, log)) is not None and newest.state is not None:
        best = newest.state.best_step
        if best is None:
            raise RequestError(
                f"--checkpoint {BEST}: {run} has not been validated up to step {newest.state.step}; name a step, or "
                f"{LAST}: {_there(run)}"
            )
        path = checkpoint_path(run / CHECKPOINTS, best)
        if path.is_dir():
            return _at(run, best)
        if best == before:  # looked for twice, and no better one since
            raise RequestError(
                f"--checkpoint {BEST}: the lowest validation loss of {run} was at step {best}, whose checkpoint is not "
                f"kept; {_there(run)}. training.load_best_model_at_end keeps it"
            )
        before = best
    raise RequestError(_without_checkpoint(run))


def _refuse_diverged(run: Path, newest: Chosen) -> None:
    assert newest.state is not None
    if "diverged" in (newest.state.ended, _read_known(run, RESULT).get("stopped")):
        raise RequestError(
            f"{run} diverged after step {newest.state.step} and has no finished adapter; lower training.learning_rate "
            f"and train again, or name one of its checkpoints with --checkpoint: {_there(run)}"
        )


def _told(run: Path, recipe: Recipe, newest: Chosen) -> str:
    step, steps = newest.checkpoint, planned(run, recipe)
    assert step is not None
    of, stopped = f" of {steps}" if steps else "", stop_of(run, step)
    if stopped is not None:
        return f"{run} was stopped after step {stopped}{of}; this is its checkpoint of step {step}"
    return f"{run} has not finished (it was cut off, or still runs); this is its checkpoint of step {step}{of}"


def _without_checkpoint(run: Path) -> str:
    what, again = "whole checkpoint" if _steps(run) else "checkpoint", shlex.quote(str(run / RECIPE))
    return f"{run} has no finished adapter and no {what} yet; go on with `topwork train {again} --resume`"


def _there(run: Path) -> str:
    steps = _steps(run)
    return f"there are {', '.join(map(str, steps))}" if len(steps) > 1 else f"there is {steps[0] if steps else 'none'}"


def _steps(run: Path) -> list[int]:
    return [checkpoint_step(path) for path in list_checkpoints(run / CHECKPOINTS)]


def _read_known(run: Path, name: str) -> Mapping[str, Any]:
    """What a line for people is made of; a file that is damaged says nothing."""
    return read_json(run / name, [])
