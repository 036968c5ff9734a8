"""Full fine-tuning, LoRA and QLoRA of one base beside each other, on every card that is known and on this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from topwork.adapters.config import FullConfig, LoraConfig
from topwork.plan.fits import Job
from topwork.plan.tokens import Tokens
from topwork.quantization.config import QuantizationConfig
from topwork.recipe.recipe import Recipe
from topwork.run.planning.place import Place
from topwork.run.planning.timing import timing_of

METHODS = ("full", "LoRA", "QLoRA")


@dataclass(frozen=True)
class Compared:
    """A method at a place. `needed_bytes` where it does not fit are those of the smallest pass; seconds and money are
    of the run, or of a million tokens where no rows are known."""

    device: str
    method: str
    fits: bool
    needed_bytes: int
    memory_bytes: int
    tokens_per_pass: int
    checkpointed_layers: int
    seconds: float | None
    money: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain values under names that stay."""
        return asdict(self)


def compared(job: Job, tokens: Tokens | None, places: Sequence[Place]) -> list[Compared]:
    """A row for each place and method, the pass chosen from memory."""
    return [_row(job, tokens, place, method) for place in places for method in METHODS]


def _row(job: Job, tokens: Tokens | None, place: Place, method: str) -> Compared:
    recipe = as_method(job.recipes[0], method)
    own = replace(job, recipes=[recipe], device=place.kind, memory_bytes=place.memory_bytes)
    fit = own.fit
    timing = timing_of(own, fit, tokens, place, here=place.kind == "cpu") if fit.fits else None
    return Compared(
        device=place.name,
        method=method,
        fits=fit.fits,
        needed_bytes=fit.needed_bytes,
        memory_bytes=place.memory_bytes,
        tokens_per_pass=fit.tokens_per_pass,
        checkpointed_layers=fit.checkpointed_layers,
        seconds=None if timing is None else timing.cost.seconds,
        money=None if timing is None else timing.cost.money,
    )


def as_method(recipe: Recipe, method: str) -> Recipe:
    """The recipe with another of the three methods, and all that memory decides left to it."""
    low_rank = recipe.adapter if isinstance(recipe.adapter, LoraConfig) else LoraConfig()
    given = recipe.quantization if recipe.quantization.load_in_4bit else QuantizationConfig(load_in_4bit=True)
    changes: Mapping[str, Any] = {
        "adapter": FullConfig() if method == "full" else low_rank,
        "quantization": given if method == "QLoRA" else QuantizationConfig(),
        "training": recipe.training.model_copy(update={"tokens_per_pass": None, "activation_checkpointing": "auto"}),
    }
    return recipe.model_copy(update=dict(changes))
