"""`topwork plan`: what a run takes of memory, time and money, from its config and rows alone. Free of torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from topwork.common.errors import RequestError
from topwork.common.os_errors import explained
from topwork.common.paths import plain_path
from topwork.data.files.places import SUFFIXES, kind_of
from topwork.models.structure import Structure
from topwork.plan.base import structure_named
from topwork.plan.devices import Device, read_devices, shipped_devices
from topwork.plan.fits import Job, changes_that_fit
from topwork.plan.new_tokens import with_planned_tokens
from topwork.plan.tokens import Tokens, counted
from topwork.recipe.recipe import Recipe, make_recipe, overridden, read_values
from topwork.recipe.sweep_config import describes_several, load_sweep
from topwork.run.planning.compared import compared
from topwork.run.planning.place import Place, card_place, find_place
from topwork.run.planning.planned import Planned
from topwork.run.planning.several import distinct_rows, together, waves_of
from topwork.run.planning.timing import question_of, step_rows, timing_of
from topwork.run.sweep.trials import model_of, trials_of
from topwork.run.which import which_recipe

Log = Callable[[str], None]
NO_ROWS = "(none)"
"""Where a model alone is planned with, in the place of data.train."""


@explained()
def plan(
    what: Recipe | Path | str,
    overrides: Sequence[str] = (),
    device: str | None = None,
    memory: str | None = None,
    compare: bool = False,
    calibrate: bool = False,
    devices: Path | str | None = None,
    log: Log = lambda _: None,
) -> Planned:
    """Plan the run that a recipe describes, or one of LoRA's defaults on a model that is named alone.

    what       a recipe, its file, a run's folder, or a model as `model.model_name_or_path` has it; of a file with
               `sweep:` or `jobs:` all members are planned, in waves of as many as fit together
    device     a card by its name ("RTX 4090"), in the place of this machine
    memory     so much memory ("24GB", "24GiB", "24000MB", "24"), in the place of a device
    compare    full fine-tuning, LoRA and QLoRA on all devices too
    calibrate  measure steps on this machine first, in about a minute, and keep what was found for later plans
    devices    a file of cards of one's own, in the form of topwork/plan/devices.yaml

    Raises RequestError for whatever is wrong with the request, as training would.
    """
    known = shipped_devices() if devices is None else read_devices(devices)
    recipes, structure = _asked_for(what, overrides)
    recipes = [with_planned_tokens(recipe, structure) for recipe in recipes]
    place = find_place(device, memory, recipes[0].model.device, known)
    counts = _counted(recipes, structure)
    waves = waves_of(job_of(recipes, structure, place, counts))
    job = next((wave for wave in waves if not wave.fit.fits), waves[0])
    tokens = counts[0] if len(counts) == 1 else None
    here = device is None and memory is None
    if calibrate and not here:
        raise RequestError(
            f"--calibrate measures this machine, and {'--device' if device is not None else '--memory'} plans for "
            "another place; give one of the two"
        )
    if calibrate:
        _measure(job, tokens, place, log)
    timing = timing_of(job, job.fit, tokens, place, here)
    several = together(waves, tokens, place, here) if len(recipes) > 1 else None
    found = Planned(job.recipes[0], job, place, tokens, timing, several, notes=_notes(recipes[0], place))
    if not found.fits:
        found = replace(found, changes=changes_that_fit(job, None if tokens is None else tokens.percentiles))
    return replace(found, table=compared(job, tokens, _places(known))) if compare else found


plan_run = plan
"""As `topwork` has it, whose `plan` is a package."""


def _asked_for(what: Recipe | Path | str, overrides: Sequence[str]) -> tuple[list[Recipe], Structure]:
    """The recipes that are meant, all members of a sweep, and their base; of a model that is named alone, a recipe of
    all defaults and without rows."""
    if isinstance(what, Recipe):
        return [what], structure_named(what.model)
    path = Path(plain_path(str(what)))
    if path.is_file() and path.suffix != ".json" and kind_of(path) in SUFFIXES:
        raise RequestError(
            f"{path} holds rows, and a plan is of a recipe, a run's folder or a model; topwork init MODEL {path} "
            "writes a recipe for them"
        )
    is_run = path.is_dir() and (path / "recipe.yaml").exists()
    if path.suffix.lower() not in (".yaml", ".yml") and not is_run:
        values = {"model": {"model_name_or_path": str(what)}, "data": {"train": NO_ROWS}}
        recipe = make_recipe(overridden(values, overrides), str(what))
    elif not is_run and describes_several(read_values(path, overrides)):
        request = load_sweep(path, overrides)
        structure = structure_named(model_of(request))
        return [trial.recipe for trial in trials_of(request, structure).trials], structure
    else:
        recipe = which_recipe(path, overrides)
    return [recipe], structure_named(recipe.model)


def _counted(recipes: Sequence[Recipe], structure: Structure) -> list[Tokens | None]:
    """For each way in which the recipes read rows."""
    return [
        None if recipe.data.train == NO_ROWS else counted(recipe, structure.context_length)
        for recipe in distinct_rows(recipes)
    ]


def job_of(recipes: Sequence[Recipe], structure: Structure, place: Place, counts: Sequence[Tokens | None]) -> Job:
    """What has to fit: of rows that are not known, sequences as long as they may be."""
    first = recipes[0]
    virtual = max(recipe.adapter.virtual_tokens for recipe in recipes)
    room = min(first.data.max_length, structure.context_length - virtual)
    longest = max(room if tokens is None else tokens.longest for tokens in counts)
    return Job(recipes, structure, place.kind, place.memory_bytes, longest + virtual)


def _notes(recipe: Recipe, place: Place) -> list[str]:
    notes = []
    if recipe.data.train == NO_ROWS:
        notes.append("a model alone was given, so LoRA's defaults are planned; give a recipe, or change some: --set …")
    elif place.assumed:
        notes.append(f"planned for {place.assumed}")
    return notes


def _places(known: Mapping[str, Device]) -> list[Place]:
    return [find_place(None, None, "cpu"), *map(card_place, known.values())]


def _measure(job: Job, tokens: Tokens | None, place: Place, log: Log) -> None:
    from topwork.run.calibrate import calibrate

    question = question_of(job, job.fit, tokens)
    calibrate(job.recipes, question, step_rows(job, question, tokens), log=log, speed=place.speed)
