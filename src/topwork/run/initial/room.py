"""A new recipe is made to fit: what `topwork plan` says is to be changed is changed, the least harmful first."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from topwork.common.errors import RequestError
from topwork.models.structure import Structure
from topwork.plan.fits import Change, Fit, Job, changes_that_fit
from topwork.recipe.recipe import Recipe
from topwork.run.planning.place import Place, gigabytes

_MODEL = "model.model_name_or_path"


@dataclass(frozen=True)
class Fitted:
    """How a recipe fits where it is to run, once `changes` are made."""

    place: Place
    fit: Fit
    changes: tuple[Change, ...]

    @property
    def sentence(self) -> str:
        """For people."""
        layers = self.fit.checkpointed_layers
        again = f", {layers} layers computed twice" if layers else ""
        return (
            f"about {gigabytes(self.fit.needed_bytes)} of {self.place.of}, with {self.fit.tokens_per_pass:,} tokens in "
            f"a pass{again}"
        )


@dataclass(frozen=True)
class Rows:
    """What a pass is made of: `Job.longest`, and the lengths that most sequences do not pass."""

    longest: int
    percentiles: Mapping[int, int]


def fitted(recipe: Recipe, structure: Structure, place: Place, rows: Rows, decided: Collection[str]) -> Fitted:
    """Raises RequestError where it fits only with another base, or with changes of what is `decided`; AdapterError
    where the adapter does not go with the base."""
    longest = min(rows.longest, recipe.data.max_length) + recipe.adapter.virtual_tokens
    job = Job([recipe], structure, place.kind, place.memory_bytes, longest)
    if job.fit.fits:
        return Fitted(place, job.fit, ())
    changes = changes_that_fit(job, rows.percentiles)
    own = [change for change in changes if change.key in decided]
    if not changes or not changes[-1].fits or own or any(change.key == _MODEL for change in changes):
        raise RequestError(_too_large(recipe, job, place, changes, own))
    return Fitted(place, _after(job, changes).fit, tuple(changes))


def _after(job: Job, changes: Sequence[Change]) -> Job:
    from topwork.plan.fits import changed

    values = {change.key: change.value for change in changes}
    return job.with_recipes(lambda recipe: changed(recipe, values))


def _too_large(recipe: Recipe, job: Job, place: Place, changes: Sequence[Change], own: Sequence[Change]) -> str:
    said = (
        f"{recipe.model.model_name_or_path} takes at least {gigabytes(job.fit.needed_bytes)} here, and there are "
        f"{place.of}"
    )
    if own:
        return f"{said}; it would fit with {own[0].key}: {own[0].value}, which --set says otherwise"
    other = next((str(change.value) for change in changes if change.key == _MODEL and change.fits), None)
    way = f"; the next smaller one that is known to fit is {other}" if other else ""
    return f"{said}, with the base in 4 bits and short rows too{way}. Else name a larger card: --device or --memory"
