"""Several runs in one recipe: a `sweep:` section or a list of `jobs:`, and the recipes that they stand for.

Free of torch, like the recipe itself. What a ready experiment (`preset:`) varies depends on the model, so it comes in
from outside as an axis.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from topwork.adapters.config import CONFIGS
from topwork.common.errors import RecipeError, RequestError, did_you_mean
from topwork.common.options import Options
from topwork.common.paths import plain_path
from topwork.recipe.grid import SEED, Axis
from topwork.recipe.recipe import SEVERAL, Recipe, make_recipe, read_values
from topwork.reporting.sweep_state import PICTURES, REPORTS, SWEEP

MOST_TRIALS = 1000
Preset = Literal["rank", "targets", "scaling", "learning-rate", "methods"]


class Halving(Options):
    """Successive halving: all members train for a part of their steps, the best of them go on."""

    factor: int = Field(3, ge=2)
    """At each rung one member of so many goes on, for so many times the steps."""
    rungs: int = Field(3, ge=2)
    """How many times members are compared; the last rung runs the whole plan."""


def _yes_or_no(value: Any) -> Any:
    return {} if value is True else None if value is False else value


class SweepConfig(Options):
    grid: dict[str, Any] = Field(default_factory=dict)
    """Key of the recipe: its values, as a list or as text (`2,4,8`, `0..0.2:0.05`, `1e-4..1e-2*5`)."""
    preset: Preset | None = None
    """A ready experiment."""
    seeds: int = Field(1, ge=1)
    """Every member is trained with so many seeds (from 0); the results are means with standard errors."""
    halving: Annotated[Halving | None, BeforeValidator(_yes_or_no)] = None
    """Successive halving: `true`, or its factor and rungs."""


TAKEN = ("before", PICTURES, SWEEP, *REPORTS)
"""What no job may be called: the bare base's column, and a sweep's own files."""


class Job(Options):
    """One user's run: sections that are laid over the recipe's own."""

    name: str = Field(min_length=1)
    """Its name, and its folder's where `output_dir` is left out."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Its rows."""
    adapter: dict[str, Any] = Field(default_factory=dict)
    """Its adapter."""
    training: dict[str, Any] = Field(default_factory=dict)
    """How it is trained."""
    evaluation: dict[str, Any] = Field(default_factory=dict)
    """How it is measured."""
    output_dir: str | None = None
    """Its folder."""


@dataclass(frozen=True)
class PlannedTrial:
    """One run of a sweep: its recipe, and by axis what sets it apart (`point` and `values` without the seed)."""

    name: str
    recipe: Recipe
    point: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepRequest:
    """A recipe with several runs, as plain values, and where it comes from."""

    values: dict[str, Any]
    sweep: SweepConfig
    jobs: tuple[Job, ...]
    source: str
    folder: Path
    described: bool
    """Whether the file itself has a `sweep:` or `jobs:`, so that its output_dir is the sweep's own."""

    def base(self, changes: dict[str, Any] | None = None, told: str = "") -> Recipe:
        """The recipe with some dotted keys set anew. Raises RecipeError."""
        values = _changed(self.values, changes or {})
        return make_recipe(values, f"{self.source}{told}", self.folder)


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepRequest:
    """Read a recipe that may have `sweep:` or `jobs:`. Raises RecipeError."""
    path = Path(plain_path(str(path)))
    request = make_sweep(read_values(path, overrides), str(path), path.parent)
    return replace(request, described=describes_several(read_values(path)))


def make_sweep(values: dict[str, Any], source: str = "recipe", folder: Path = Path()) -> SweepRequest:
    """A SweepRequest from plain values. Raises RecipeError."""
    own = {key: value for key, value in values.items() if key not in SEVERAL}
    sweep = _checked(SweepConfig, values.get("sweep") or {}, f"{source}: sweep")
    given = values.get("jobs") or []
    if not isinstance(given, list):
        raise RecipeError(f"{source}: jobs holds {type(given).__name__}, expected a list of {{name, data, …}}")
    jobs = tuple(_checked(Job, job, f"{source}: jobs[{index}]") for index, job in enumerate(given))
    taken = [job.name for job in jobs if job.name in TAKEN]
    if taken:
        raise RecipeError(f"{source}: a job is called {taken[0]!r}, as a sweep calls something of its own; rename it")
    return SweepRequest(own, sweep, jobs, source, folder, describes_several(values))


def describes_several(values: dict[str, Any]) -> bool:
    """Whether there is a section of several runs."""
    return any(values.get(name) is not None for name in SEVERAL)


def expand(request: SweepRequest, axes: Sequence[Axis], out: Path) -> list[PlannedTrial]:
    """The product of all axes (or the jobs) as recipes, each with a folder in `out`. Raises RecipeError for values that
    do not fit, RequestError for two trials with one name or one folder."""
    trials = _job_trials(request, out) if request.jobs else _grid_trials(request, axes, out)
    _refuse_twins(trials)
    return trials


def _grid_trials(request: SweepRequest, axes: Sequence[Axis], out: Path) -> list[PlannedTrial]:
    labels = [axis.label for axis in axes]
    if doubled := next((label for label in labels if labels.count(label) > 1), None):
        raise RequestError(f"{doubled} is varied twice, by --seeds or a preset and by the grid; give one of the two")
    count = prod(len(axis.variants) for axis in axes)
    if not axes or count < 2:
        raise RequestError(
            "a sweep needs two members or more: give --grid KEY=VALUES, --preset, --seeds, or a sweep: or jobs: section"
        )
    if count > MOST_TRIALS:
        raise RequestError(f"the grid has {count:,} members, expected at most {MOST_TRIALS:,}; give fewer values")
    trials = []
    for chosen in product(*(axis.variants for axis in axes)):
        name = "_".join(variant.name for variant in chosen)
        pairs = [(axis.label, variant) for axis, variant in zip(axes, chosen) if axis.label != SEED]
        point = "_".join(variant.name for _, variant in pairs) or "all"
        changes = {key: value for variant in chosen for key, value in variant.changes.items()}
        recipe = request.base(changes | {"output_dir": str(out / name)}, f" as {name}")
        trials.append(PlannedTrial(name, recipe, point, {label: variant.shown for label, variant in pairs}))
    return trials


def _job_trials(request: SweepRequest, out: Path) -> list[PlannedTrial]:
    sweep = request.sweep
    if sweep.grid or sweep.preset or sweep.seeds > 1 or sweep.halving:
        raise RequestError(
            f"{request.source} has jobs: beside a grid, a preset, seeds or halving; jobs have data of their own, so "
            "they are not compared. Give one of the two"
        )
    trials = []
    for job in request.jobs:
        if Path(job.name).name != job.name or job.name in (".", "..") or job.name.startswith("."):
            raise RequestError(f"the job's name {job.name!r} cannot be a folder's; give letters, digits, - and _")
        values = dict(request.values)
        for section in ("data", "adapter", "training", "evaluation"):
            laid = getattr(job, section)
            if laid:
                values[section] = _section(values.get(section), section, laid)
        values["output_dir"] = job.output_dir or str(out / job.name)
        recipe = make_recipe(values, f"{request.source}: job {job.name!r}", request.folder)
        trials.append(PlannedTrial(job.name, recipe, job.name, {"job": job.name}))
    return trials


def _refuse_twins(trials: Sequence[PlannedTrial]) -> None:
    names: set[str] = set()
    folders: dict[Path, str] = {}
    for trial in trials:
        if trial.name in names:
            raise RequestError(f"two members have the name {trial.name!r}; give each value, or each job's name, once")
        names.add(trial.name)
        folder = Path(trial.recipe.output_dir).resolve()
        if folder in folders:
            raise RequestError(
                f"{folders[folder]!r} and {trial.name!r} have one output_dir, {trial.recipe.output_dir}; give each "
                "its own, or leave output_dir out"
            )
        folders[folder] = trial.name


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The values with dotted keys set. Another adapter method leaves the recipe's options behind that say nothing to
    it."""
    changed = deepcopy(values)
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if not name:
            changed[section] = value
        else:
            sections.setdefault(section, {})[name] = value
    for section, laid in sections.items():
        changed[section] = _section(changed.get(section), section, laid)
    return changed


def _section(own: Any, section: str, laid: dict[str, Any]) -> dict[str, Any]:
    """A section with options laid over it."""
    before = dict(own) if isinstance(own, dict) else {}
    if section == "adapter" and "method" in laid:
        kind = CONFIGS.get(str(laid["method"]))
        before = {key: value for key, value in before.items() if kind is not None and key in kind.model_fields}
    return {**before, **laid}


def _checked(kind: type[Any], values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise RecipeError(f"{where} holds {type(values).__name__}, expected {', '.join(kind.model_fields)}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        told = []
        for entry in error.errors():
            at = ".".join(str(part) for part in entry["loc"])
            if entry["type"] == "extra_forbidden":
                known = Halving.model_fields if entry["loc"][0] == "halving" else kind.model_fields
                near = did_you_mean(str(entry["loc"][-1]), known, limit=1) or f"; known here: {', '.join(known)}"
                told.append(f"unknown key {at!r}{near}")
            elif entry["type"] == "missing":
                told.append(f"{at!r} is needed and missing")
            else:
                told.append(f"{at!r}: {entry['msg'].lower()}, given {entry.get('input')!r}")
        raise RecipeError("\n".join([f"{where}:", *(f"  {line}" for line in told)])) from error
