"""What a rule is, and what it sees."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from topwork.plan.advice.facts import Facts
from topwork.plan.advice.sources import Source

ANSWER = "answer"
"""What the first rules decide: prompt, retrieval or fine-tune. All else is a recipe's key."""


@dataclass
class Case:
    """The facts, and what rules before have chosen (or what stood already)."""

    facts: Facts
    chosen: dict[str, Any] = field(default_factory=dict)

    def value(self, key: str, default: Any = None) -> Any:
        """What was chosen for a key."""
        return self.chosen.get(key, default)

    @property
    def method(self) -> str:
        """The adapter's."""
        return str(self.value("adapter.method", "lora"))

    @property
    def low_rank(self) -> bool:
        """Whether it is a LoRA (or DoRA), for which most rules speak."""
        return self.method in ("lora", "dora")

    @property
    def epochs(self) -> float:
        """How often rows are seen."""
        return float(self.value("training.num_train_epochs", 1.0))

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run; None where the rows are not known."""
        fixed = self.value("training.max_steps")
        if fixed is not None:
            return int(fixed)
        if not self.facts.rows:
            return None
        trained = self.facts.rows * (1 - self.value("data.eval_fraction", 0.0))
        return max(1, math.ceil(trained / self.value("training.batch_size", 16)) * math.ceil(self.epochs))


@dataclass(frozen=True)
class Rule:
    """One rule. Of those that decide the same, the first that applies does.

    name     by which tests, pages and `--json` know it
    decides  `ANSWER` or a recipe's key
    when     when it applies, in words; `applies` is the same for the machine
    what     what it decides, in words; `value` is the same for the machine
    why      the reason, a sentence
    sources  where that is known from
    """

    name: str
    decides: str
    when: str
    applies: Callable[[Case], bool]
    what: str
    value: Callable[[Case], Any]
    why: str
    sources: tuple[Source, ...]

    @property
    def date(self) -> str:
        """The day of the newest record, or the last look, behind it."""
        return max(source.date for source in self.sources)


def always(_: Case) -> bool:
    """For rules that stand last."""
    return True


def given(value: Any) -> Callable[[Case], Any]:
    """A value that depends on nothing."""
    return lambda _: value


Table = tuple[Rule, ...]
