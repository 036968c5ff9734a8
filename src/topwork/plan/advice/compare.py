"""A recipe beside the advice: what differs, and why."""

from dataclasses import dataclass
from typing import Any

from topwork.plan.advice.advise import Advice, Choice
from topwork.recipe.recipe import Recipe

WITHIN = {"training.learning_rate": 1.5, "data.eval_fraction": 2.0}
"""Values whose ratio is no larger are as good as the same: the evidence is no finer."""
SAFE = {"data.too_long": "refuse", "evaluation.grader": "auto"}
"""Values that do no harm whatever is advised: a run that stops and says so, a grader that looks first."""
AT_LEAST = ("data.max_length", "evaluation.max_new_tokens")
"""Limits, which may be higher."""


@dataclass(frozen=True)
class Difference:
    """A key of which the recipe says otherwise than the advice."""

    key: str
    given: Any
    choice: Choice

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.choice.as_json(), "given": self.given, "advised": self.choice.value}


def compare(recipe: Recipe, advice: Advice) -> tuple[Difference, ...]:
    """Where they differ, in the advice's order."""
    found = (Difference(choice.key, value_at(recipe, choice.key), choice) for choice in advice.choices)
    return tuple(each for each in found if not _same(each.key, each.given, each.choice.value) and _spoken_of(each))


def value_at(recipe: Recipe, key: str) -> Any:
    """What a recipe says at a dotted key; None where its method knows no such option."""
    at: Any = recipe
    for part in key.split("."):
        at = getattr(at, part, None)
    if key == "adapter.method" and getattr(recipe.adapter, "use_dora", False):
        return "dora"
    return at


def _spoken_of(each: Difference) -> bool:
    """Not the options of another adapter's method: that the method differs is said once."""
    return each.given is not None or not each.key.startswith("adapter.")


def _same(key: str, given: Any, advised: Any) -> bool:
    if given == advised or given == SAFE.get(key, advised):
        return True
    if not isinstance(given, int | float) or isinstance(given, bool):
        return False
    if key in AT_LEAST:
        return bool(given >= advised)
    ratio = WITHIN.get(key)
    return ratio is not None and given > 0 and max(given / advised, advised / given) <= ratio
