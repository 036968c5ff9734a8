"""The trials that a recipe with `sweep:` or `jobs:` stands for, on its base. Free of torch, but for a preset's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from topwork.common.errors import RequestError
from topwork.models.config import ModelConfig
from topwork.models.structure import Structure
from topwork.recipe.grid import Axis, grid_axes, parse_grid, seed_axis
from topwork.recipe.places import run_folder
from topwork.recipe.recipe import Recipe
from topwork.recipe.sweep_config import PlannedTrial, SweepRequest, expand

if TYPE_CHECKING:
    from topwork.run.presets import Experiment


@dataclass(frozen=True)
class Trials:
    """What is trained, what it is varied along, and where it goes."""

    trials: tuple[PlannedTrial, ...]
    axes: tuple[Axis, ...]
    out: Path
    ready: "Experiment | None" = None


def trials_of(request: SweepRequest, structure: Structure, grid: Sequence[str] = ()) -> Trials:
    """The trials of a request on its base; `grid` is the command line's. Raises RecipeError, and RequestError for
    trials that cannot share a pass."""
    ready = None
    if request.sweep.preset:
        from topwork.run.presets import experiment  # the adapters' methods, which import torch

        ready = experiment(request.sweep.preset, request, structure)
    axes = [] if ready is None else [ready.axis]
    axes += grid_axes(request.sweep.grid, parse_grid(grid))
    axes += [seed_axis(request.sweep.seeds)] if request.sweep.seeds > 1 else []
    out = _out(request)
    trials = tuple(expand(request, axes, out))
    _one_base(trials)
    return Trials(trials, tuple(axes), out, ready)


def model_of(request: SweepRequest) -> ModelConfig:
    """The base that all trials share."""
    if request.jobs:
        return expand(request, [], Path("jobs"))[0].recipe.model  # the recipe itself may have no data
    return request.base().model


def waves(names: Sequence[str], fits: Callable[[Sequence[str]], int]) -> list[list[str]]:
    """Trials in waves of as many as fit together, in their order."""
    found: list[list[str]] = []
    rest = list(names)
    while rest:
        count = max(1, min(len(rest), fits(rest)))
        found.append(rest[:count])
        rest = rest[count:]
    return found


def _out(request: SweepRequest) -> Path:
    """Where a sweep goes: the recipe's output_dir where that has a `sweep:` or `jobs:`; beside a single run's else."""
    named = request.values.get("output_dir") or Recipe.model_fields["output_dir"].default
    own = str(Path(run_folder(str(named))))
    return Path(own if request.described else f"{own}-{request.sweep.preset or 'sweep'}")


def _one_base(trials: Sequence[PlannedTrial]) -> None:
    """Trials share a pass, so what decides the pass is the same in all of them."""
    first = trials[0]
    for trial in trials[1:]:
        one, other = first.recipe, trial.recipe
        for name, left, right in (
            ("model", one.model, other.model),
            ("quantization", one.quantization, other.quantization),
            ("training.tokens_per_pass", one.training.tokens_per_pass, other.training.tokens_per_pass),
            (
                "training.activation_checkpointing",
                one.training.activation_checkpointing,
                other.training.activation_checkpointing,
            ),
            ("training.threads", one.training.threads, other.training.threads),
        ):
            if left != right:
                raise RequestError(
                    f"{first.name!r} and {trial.name!r} share a pass over one base, but differ in {name} ({left!r} and "
                    f"{right!r}); give all the same, or run a sweep for each"
                )
