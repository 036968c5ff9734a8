"""sweep.json: everything a sweep knows. `topwork sweep` writes it whole after each change, so that a killed one goes on
from it, and the report is made from it alone.

It is read strictly: a field that is not known, is missing or is of another type is an error that names it.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from topwork.common.errors import RequestError
from topwork.common.files import write_json
from topwork.common.os_errors import why
from topwork.reporting.readers import Record, read_metrics

SWEEP, PICTURES = "sweep.json", "pictures"
REPORTS = ("sweep.md", "sweep.html")
TOLD_PROBLEMS = 5


class TrialState(StrEnum):
    """Where a trial stands."""

    WAITING = "waiting"
    TRAINING = "training"
    FINISHED = "finished"
    EARLY_STOPPING = "early stopping"
    DIVERGED = "diverged"
    LEFT = "left"
    """Halving took it out."""


class _Stated(BaseModel):
    """A part of sweep.json. A field with a default stands in the file only once it was set."""

    model_config = ConfigDict(
        extra="forbid", strict=True, populate_by_name=True, validate_assignment=True, allow_inf_nan=False
    )


class TrialResult(_Stated):
    """Of a trial's result.json, and what its metrics say."""

    stopped: Literal["finished", "early stopping", "diverged", "paused", "interrupted"]
    steps: int
    planned_steps: int
    tokens: int
    seconds: float
    tokens_per_second: float | None
    peak_memory_bytes: int
    first_loss: float | None
    last_loss: float | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    best_step: int | None
    best_eval_loss: float | None
    shared_with: int
    """Trials of its pass, with itself."""
    base_weights_bytes: int
    warnings: list[str]
    trained: int
    """Parameters."""
    last_eval_loss: float | None


class TrialScores(_Stated):
    """What answers to `rows` rows were worth; shares are absent where nothing was asked, and the JSON's where the
    grader is another."""

    exact_match: float | None = None
    json_valid: float | None = None
    fields: dict[str, float] | None = None
    loss: float
    rows: int
    grader: str
    data: str


class TrialRecord(_Stated):
    """What is known of a trial."""

    name: str
    folder: str
    """From the sweep's folder on, where it is in there."""
    point: str
    values: dict[str, JsonValue]
    """By axis, without the seed."""
    seed: int
    recipe: str
    """A hash of what makes the trial what it is."""
    state: TrialState
    rung: int | None
    left_at: int | None
    """The rung at which halving took it out."""
    result: TrialResult | None
    scores: TrialScores | None
    before: TrialScores | None
    """The bare base's."""
    on_validation: bool | None
    """Whether it was scored on validation's rows, of which training knows the loss over all."""
    error: str | None = None
    """Why it diverged, where it trained alone."""


class Wave(_Stated):
    """What trains together."""

    rung: int
    stop_at: int | None
    names: list[str] = Field(alias="members")
    why: str
    begun: bool = True
    """Such a wave is never cut again; the first sweeps did not write it."""
    done: bool
    scored: bool
    pass_seconds: float | None = None
    """Of its passes, each counted once."""
    pass_tokens: int | None = None
    """Of all its trials."""
    peak_memory_bytes: int | None = None


class Rungs(_Stated):
    """Successive halving: after the steps `stops` one point of `factor` goes on."""

    factor: int
    rungs: int
    stops: list[int]


class AloneSpeed(_Stated):
    """What a trial alone came to in some steps, the first not counted."""

    tokens_per_second: float
    peak_memory_bytes: int | None
    steps: int


class Estimate(_Stated, frozen=True):
    """A mean over `count` seeds. `error` is its standard error; with one seed the binomial one of a share of `rows`
    graded rows; None where nothing tells it."""

    mean: float
    error: float | None
    count: int


class Point(_Stated, frozen=True):
    """Trials that differ in the seed alone. Diverged ones are counted, and are in no mean."""

    name: str
    values: dict[str, JsonValue]
    names: list[str] = Field(alias="members")
    diverged: int
    left: bool
    loss: Estimate | None
    accuracy: Estimate | None
    trained: float | None


class Verdict(_Stated, frozen=True):
    """The point of diminishing returns along the ranks, with the other axes held at `others`; `rank` is None where the
    rule cannot be applied, and `text` says why."""

    others: dict[str, JsonValue]
    measure: str
    best: int | float | None
    rank: int | float | None
    text: str
    sentence: str
    """The text, with the other axes' values in front."""


class Cost(_Stated):
    """Together, and one by one: estimated, and measured alone where that was asked for."""

    pass_seconds: float
    tokens: int
    tokens_per_second: float | None
    peak_memory_bytes: float | None
    largest_alone_bytes_estimate: float | None
    base_weights_bytes: float | None
    trials: int = Field(alias="members")
    waves: int
    one_by_one_seconds_estimate: float | None
    alone_seconds: float | None = None
    time_ratio: float | None = None
    """Together, as a part of `alone_seconds`."""
    largest_alone_bytes: float | None = None
    alone_steps: int | None = None


class SweepState(_Stated):
    """A sweep, as sweep.json tells it: `members` there are its trials."""

    format: Literal[1]
    name: str
    model: str
    preset: str | None
    text: str | None
    """What a preset shows."""
    left_out: list[str]
    """A preset's values that this base cannot take, and why."""
    jobs: bool
    axes: dict[str, list[JsonValue]]
    halving: Rungs | None
    trials: list[TrialRecord] = Field(alias="members", min_length=1)
    waves: list[Wave]
    """All that were begun, in order."""
    alone: dict[str, AloneSpeed | None]
    """By point; None where it diverged at once."""
    points: list[Point] = Field(default_factory=list)
    diminishing_returns: list[Verdict] = Field(default_factory=list)
    cost: Cost | None = None

    def trial(self, name: str) -> TrialRecord:
        """The trial of this name."""
        return next(trial for trial in self.trials if trial.name == name)

    def alive(self) -> list[TrialRecord]:
        """Trials that are still in the race, in order."""
        return [trial for trial in self.trials if trial.state not in (TrialState.DIVERGED, TrialState.LEFT)]

    def as_json(self) -> dict[str, Any]:
        """Plain values, as they stand in the file."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def save(self, folder: Path) -> None:
        """Write FOLDER/sweep.json."""
        write_json(folder / SWEEP, self.as_json())


def read_sweep(folder: Path) -> SweepState:
    """A sweep's folder's sweep.json. Raises RequestError where there is none, and where it is torn or does not fit,
    with the file and each field."""
    file = folder / SWEEP
    try:
        return SweepState.model_validate_json(file.read_bytes(), by_alias=True, by_name=False)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) and not file.is_symlink() else why(error)
        raise RequestError(f"no sweep in '{folder}' ({file.name} {reason}); name a sweep's folder") from error
    except ValidationError as error:
        told = [_problem(entry) for entry in error.errors()]
        more = [f"and {len(told) - TOLD_PROBLEMS} more"] if len(told) > TOLD_PROBLEMS else []
        raise RequestError(
            f"{file} cannot be read: {'; '.join(told[:TOLD_PROBLEMS] + more)}. Mend it, or take the folder away and "
            "begin anew"
        ) from error


def trial_metrics(folder: Path, trial: TrialRecord) -> list[Record]:
    """The metrics of a trial of the sweep in `folder`; none where it has not begun."""
    try:
        return read_metrics(folder / trial.folder / "metrics.jsonl")
    except RequestError:
        return []


def _problem(entry: Mapping[str, Any]) -> str:
    """What pydantic found, as people write fields: `members[3].result.steps`."""
    at = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in entry["loc"]).lstrip(".")
    if entry["type"] == "json_invalid":
        return f"it is not whole JSON ({entry['ctx']['error']})"
    if entry["type"] == "extra_forbidden":
        return f"unknown field {at!r}"
    if entry["type"] == "missing":
        return f"{at!r} is needed and missing"
    told = f"{entry['msg'].lower()}, given {entry['input']!r:.80}"
    return f"{at!r}: {told}" if at else told
