"""From facts to advice: what to do, and a recipe's options, each with the rule that chose it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from topwork.plan.advice.facts import Facts
from topwork.plan.advice.rule import ANSWER, Case, Rule
from topwork.plan.advice.table import RULES

SECTIONS = ("model", "quantization", "adapter", "data", "training", "evaluation")
"""The order of a recipe."""
DEFAULT_DATA, DEFAULT_MODEL = "train.jsonl", "smollm2-135m"


@dataclass(frozen=True)
class Choice:
    """One decision: the recipe's key (or `answer`), its value, and the rule that made it."""

    key: str
    value: Any
    rule: Rule

    @property
    def reason(self) -> str:
        """Why, in a sentence."""
        return self.rule.why

    @property
    def source(self) -> str:
        """Where that is known from."""
        return "; ".join(map(str, self.rule.sources))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        told = {"rule": self.rule.name, "when": self.rule.when, "reason": self.reason}
        sources = [{"text": each.text, "how": each.how, "date": each.date} for each in self.rule.sources]
        return {"key": self.key, "value": self.value, **told, "sources": sources}


@dataclass(frozen=True)
class Advice:
    """What to do, and why.

    answer   prompt, retrieval or fine-tune
    choices  the recipe's options in a recipe's order, for whoever fine-tunes, now or later
    steps    optimizer steps of the advised run; None where the rows are not known
    """

    facts: Facts
    answer: Choice
    choices: tuple[Choice, ...]
    steps: int | None = None

    def value(self, key: str, default: Any = None) -> Any:
        """What is advised for a key."""
        return next((choice.value for choice in self.choices if choice.key == key), default)

    def recipe(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A recipe's values: what is advised, and dotted keys that stand already (the base, the rows)."""
        values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        flat = {
            "model.model_name_or_path": DEFAULT_MODEL, "data.train": DEFAULT_DATA,
            **{choice.key: choice.value for choice in self.choices}, **self.facts.decided, **(given or {}),
        }  # fmt: skip
        found: dict[str, Any] = values
        for key, value in flat.items():
            at = found
            *parents, last = key.split(".")
            for parent in parents:
                at = at.setdefault(parent, {})
            at[last] = value
        return {name: value for name, value in found.items() if value not in ({}, None)}


def advise(facts: Facts) -> Advice:
    """Go through the table: of the rules that decide the same, the first that applies. What stands already is not
    decided again."""
    case = Case(facts, dict(facts.decided))
    made: dict[str, Choice] = {}
    for rule in RULES:
        if rule.decides in case.chosen or not rule.applies(case):
            continue
        value = rule.value(case)
        case.chosen[rule.decides] = value
        made[rule.decides] = Choice(rule.decides, value, rule)
    answer = made.pop(ANSWER)
    order = {name: number for number, name in enumerate(SECTIONS)}
    choices = sorted(made.values(), key=lambda choice: order[choice.key.partition(".")[0]])
    return Advice(facts, answer, tuple(choices), case.steps)
