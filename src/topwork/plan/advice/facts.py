"""What advice is given on: the task, the rows, the base and the machine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from topwork.common.errors import RequestError, did_you_mean
from topwork.models.structure import Structure

TASKS: Mapping[str, str] = MappingProxyType({
    "classification": "one of a few answers for each text: an intent, a topic, a yes or no",
    "extraction": "fields out of a text, as JSON or another fixed form",
    "chat-style": "conversations in a tone or a role of your own",
    "instruction": "all kinds of instructions and their answers",
    "continued-pretraining": "plain text of a domain or a language, no questions",
    "tool-calls": "calls of functions, with their arguments",
    "reasoning": "answers that are worked out in steps: mathematics, code, plans",
    "summarization": "short texts for long ones, or sentences for facts",
})  # fmt: skip
GOALS: Mapping[str, str] = MappingProxyType({
    "changing-knowledge": "answers depend on what changes: prices, stock, news, documents that are edited",
    "citations": "answers have to name where they are from",
    "new-facts": "the model should know facts that it does not know",
    "format": "answers keep to a form",
    "style": "answers keep to a tone or a role",
    "latency": "answers have to come quickly: short prompts, a small model",
    "cost": "answers have to be cheap: short prompts, a small model",
})  # fmt: skip
Rows = Literal["messages", "text"]


@dataclass(frozen=True)
class Facts:
    """What is known; what is not is None, and rules that need it do not speak.

    task            a name of `TASKS`
    rows            training rows; None where nobody said
    tokens_per_row  on average, prompt and answer
    learned_share   the share of tokens that are learned, 0 to 1
    longest         the longest row in tokens
    measured        whether tokens were counted, and not estimated from letters
    kind            conversations, or plain text
    documents       whether plain text stands in a .txt
    writes_calls    whether the base's template writes tool calls; None where it was not looked at
    turns           whether conversations have more than one answer
    structure       the base; `parameters` where only its size is known
    memory_bytes    of the card, or what this machine has free
    goals           names of `GOALS`
    held_out        whether a file of validation rows is given
    decided         recipe keys that stand already; the rest is advised around them
    """

    task: str
    rows: int | None = None
    tokens_per_row: float | None = None
    learned_share: float | None = None
    longest: int | None = None
    measured: bool = False
    kind: Rows = "messages"
    documents: bool = False
    writes_calls: bool | None = None
    turns: bool = False
    structure: Structure | None = None
    parameters: int | None = None
    memory_bytes: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    goals: frozenset[str] = frozenset()
    held_out: bool = False
    decided: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises RequestError for a task or a goal that there is not, and for amounts that cannot be."""
        _known("task", self.task, TASKS)
        for goal in sorted(self.goals):
            _known("goal", goal, GOALS)
        for name, least in (
            ("rows", 0), ("tokens_per_row", 1), ("longest", 1), ("parameters", 1), ("memory_bytes", 1),
        ):  # fmt: skip
            given = getattr(self, name)
            if given is not None and not given >= least:
                called = "examples" if name == "rows" else name
                raise RequestError(f"{called.replace('_', ' ')}: {given:,} cannot be; expected at least {least}")
        if self.learned_share is not None and not 0 <= self.learned_share <= 1:
            raise RequestError(f"learned share: {self.learned_share:g} cannot be; expected a share from 0 to 1")

    @property
    def learned_tokens(self) -> int | None:
        """Of all rows, once; without a share, half of them (all of plain text)."""
        if self.rows is None or self.tokens_per_row is None:
            return None
        share = self.learned_share if self.learned_share is not None else 1.0 if self.kind == "text" else 0.5
        return round(self.rows * self.tokens_per_row * share)

    @property
    def hidden(self) -> int | None:
        """The base's width. Where only its size is known, that of a llama so large: 12 · layers · width² parameters,
        and a width of 128 a layer."""
        if self.structure is not None:
            return self.structure.hidden
        return None if self.parameters is None else round((self.parameters * 128 / 12) ** (1 / 3))

    @property
    def family(self) -> str:
        """The base's model_type, or nothing."""
        return self.structure.family if self.structure is not None else ""

    @property
    def context(self) -> int | None:
        """The longest sequence that the base reads, in tokens."""
        return self.structure.context_length if self.structure is not None else None

    @property
    def trained_per_rank(self) -> int | None:
        """What LoRA on all linear layers but the head trains for each rank: in + out of each."""
        if self.structure is None:
            return None
        linear = [m for m in self.structure.modules if m.kind == "linear" and m.path != self.structure.head]
        return sum(module.rows + module.columns for module in linear) or None


def _known(what: str, given: str, known: Mapping[str, str]) -> None:
    if given not in known:
        raise RequestError(f"there is no {what} {given!r}; there are {', '.join(known)}{did_you_mean(given, known)}")
