"""Members of a sweep, or jobs, beside each other: which train together, and what all of them take. Free of torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from topwork.plan.fits import Job
from topwork.plan.tokens import Tokens
from topwork.recipe.recipe import Recipe
from topwork.run.planning.place import Place
from topwork.run.planning.timing import timing_of
from topwork.run.sweep.trials import waves
from topwork.training.together import members_that_fit


@dataclass(frozen=True)
class Together:
    """How members share a machine.

    waves           how many train together, one wave after the other
    seconds, money  of all waves; None where that is not known
    """

    members: int
    waves: tuple[int, ...]
    seconds: float | None
    money: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain values under names that stay."""
        return {**asdict(self), "waves": list(self.waves)}


def waves_of(job: Job) -> list[Job]:
    """The job's recipes in waves of as many as fit together, as `topwork sweep` cuts them."""
    places = {str(number): recipe for number, recipe in enumerate(job.recipes)}
    training = job.recipes[0].training

    def some(names: Sequence[str]) -> Job:
        return replace(job, recipes=[places[name] for name in names])

    def fit(names: Sequence[str]) -> int:
        asked = training.tokens_per_pass, training.activation_checkpointing
        return members_that_fit(some(names).setup, job.memory_bytes, *asked, job.longest)

    return [some(names) for names in waves(list(places), fit)]


def together(found: Sequence[Job], tokens: Tokens | None, place: Place, here: bool) -> Together:
    """What all waves take. Their time is known where all members step alike over the same rows."""
    sizes = tuple(len(job.recipes) for job in found)
    members = [recipe for job in found for recipe in job.recipes]
    if tokens is None or len({_steps(recipe) for recipe in members}) > 1 or not all(job.fit.fits for job in found):
        return Together(sum(sizes), sizes, None, None)
    timings = [timing_of(job, job.fit, tokens, place, here) for job in found]
    costs = [timing.cost for timing in timings if timing is not None]
    if len(costs) < len(found):
        return Together(sum(sizes), sizes, None, None)
    starts = sum(cost.start_seconds for cost in costs[1:])  # the base is loaded once
    seconds = sum(cost.seconds for cost in costs) - starts
    price = place.price_per_hour
    return Together(sum(sizes), sizes, seconds, None if price is None else seconds / 3600 * price)


def distinct_rows(recipes: Sequence[Recipe]) -> list[Recipe]:
    """One recipe for each way in which rows are read."""
    return list({f"{each.data.model_dump_json()} {each.adapter.virtual_tokens}": each for each in recipes}.values())


def _steps(recipe: Recipe) -> tuple[Any, ...]:
    training = recipe.training
    return training.batch_size, training.num_train_epochs, training.max_steps, training.eval_steps
