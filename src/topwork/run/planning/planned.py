"""What `topwork plan` found of a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from topwork.plan.fits import Change, Fit, Job
from topwork.plan.tokens import Tokens
from topwork.recipe.recipe import Recipe
from topwork.run.planning.compared import Compared
from topwork.run.planning.place import Place
from topwork.run.planning.several import Together
from topwork.run.planning.timing import Timing
from topwork.training.memory import PassShape, Usage, moments
from topwork.training.schedule import planned_steps


@dataclass(frozen=True)
class Planned:
    """A run as it would be at a place: whether it fits, with which pass, what it takes of memory, time and money.

    job      of the members that train together: of a sweep in waves the first, or the first that does not fit
    several  the waves of a sweep; memory and time beside it are of one wave
    tokens   of the recipe's rows; None where a model alone was given, its rows are on the Hub, or
             members have rows of their own
    changes  what would make it fit, the least harmful first; empty where it does
    table    full fine-tuning, LoRA and QLoRA on all devices, where that was asked for
    notes    what was assumed, for people
    """

    recipe: Recipe
    job: Job
    place: Place
    tokens: Tokens | None
    timing: Timing | None
    several: Together | None = None
    changes: Sequence[Change] = ()
    table: Sequence[Compared] = ()
    notes: Sequence[str] = field(default=())

    @property
    def fit(self) -> Fit:
        """The pass, and whether it fits."""
        return self.job.fit

    @property
    def fits(self) -> bool:
        """Whether the run fits into the memory."""
        return self.fit.fits

    @property
    def tokens_per_pass(self) -> int:
        """The largest pass that fits, or as the recipe says; where nothing fits, the smallest there is."""
        return self.fit.tokens_per_pass

    @property
    def checkpointed_layers(self) -> int:
        """Layers that keep their input alone, as few as let that pass fit."""
        return self.fit.checkpointed_layers

    @property
    def peak(self) -> Usage:
        """The moment that takes most."""
        return max(self.moments, key=lambda usage: usage.bytes)

    @cached_property
    def moments(self) -> list[Usage]:
        """Every part at every moment of the largest pass that the rows make."""
        return moments(self.job.setup, self.shape, self.checkpointed_layers)

    @cached_property
    def shape(self) -> PassShape:
        """The largest pass of the run: of rows that are known what the fullest step has of them, where that is less
        than the pass may hold; else, and of what does not fit, a pass that is full and learned whole."""
        whole, tokens = self.job.shape(self.tokens_per_pass), self.tokens
        if tokens is None or not self.fits:
            return whole
        training, recipes = self.recipe.training, self.job.recipes
        rows = sum(min(recipe.training.batch_size, tokens.sequences) for recipe in recipes)
        steps = planned_steps(training, math.ceil(tokens.sequences / training.batch_size))
        virtual = max(recipe.adapter.virtual_tokens for recipe in recipes)
        step = tokens.fullest_step(rows, steps) + rows * virtual
        size = min(step, whole.tokens)
        learned = min(size, math.ceil(size * tokens.learned_share))
        return PassShape(size, learned, min(whole.longest, size), alone=step <= whole.tokens)

    @property
    def trained_parameters(self) -> int:
        """That the adapter has."""
        return sum(member.values for member in self.job.setup.members)

    def as_json(self) -> dict[str, Any]:
        """Plain values under names that stay; sizes in bytes, times in seconds, money in US dollars."""
        structure, recipe = self.job.structure, self.recipe
        return {
            "model": recipe.model.model_name_or_path,
            "parameters": structure.parameters,
            "trained_parameters": self.trained_parameters,
            "method": recipe.adapter.method,
            "load_in_4bit": recipe.quantization.load_in_4bit,
            "load_in_8bit": recipe.quantization.load_in_8bit,
            "device": self.place.name,
            "device_kind": self.place.kind,
            "memory_bytes": self.place.memory_bytes,
            "price_per_hour": self.place.price_per_hour,
            "fits": self.fits,
            "needed_bytes": self.fit.needed_bytes,
            "peak": _usage(self.peak),
            "moments": [_usage(usage) for usage in self.moments],
            "tokens_per_pass": self.tokens_per_pass,
            "largest_pass": self.shape.tokens,
            "checkpointed_layers": self.checkpointed_layers,
            "checkpointable_layers": structure.checkpointable,
            "together": None if self.several is None else self.several.as_json(),
            "data": None if self.tokens is None else self.tokens.as_json(),
            "time": None if self.timing is None else self.timing.as_json(),
            "changes": [change.as_json() for change in self.changes],
            "compare": [row.as_json() for row in self.table],
            "notes": list(self.notes),
        }

    def as_text(self) -> str:
        """For people: the verdict in a line, then memory, time and cost, then what to do."""
        from topwork.run.planning.text import text_of

        return text_of(self)


def _usage(usage: Usage) -> dict[str, Any]:
    return {"moment": usage.moment, "bytes": usage.bytes, "parts": dict(usage.parts)}
