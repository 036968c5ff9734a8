"""Advice as people read it: the answer first, then each choice with its reason; and as a recipe with comments."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from topwork.plan.advice.advise import Advice, Choice
from topwork.plan.advice.compare import Difference
from topwork.plan.advice.sources import Source

WIDTH = 100
ANSWERS: Mapping[str, str] = {
    "prompt": "Prompt first.", "retrieval": "Retrieve.", "fine-tune": "Fine-tune."
}  # fmt: skip


def advice_text(advice: Advice, told: Sequence[str] = ()) -> str:
    """All of it; `told` are lines on the facts it is given for."""
    sources = _Sources()
    lines = _answer(advice, told, sources)
    lines.append("The recipe:" if advice.answer.value == "fine-tune" else "If you fine-tune nevertheless, the recipe:")
    for choice in advice.choices:
        lines += ["", f"  {choice.key}: {value_text(choice.value)}", *_reason(choice, sources)]
    return "\n".join([*lines, *sources.lines()])


def differences_text(advice: Advice, differences: Sequence[Difference], told: Sequence[str] = ()) -> str:
    """Where a recipe differs from the advice, and nothing where it does not."""
    sources = _Sources()
    lines = _answer(advice, told, sources)
    lines.append(
        f"{len(differences)} of {len(advice.choices)} options that advice speaks of are otherwise in the recipe."
    )
    for each in differences:
        values = f"{value_text(each.given)} -> {value_text(each.choice.value)}"
        lines += ["", f"  {each.key}: {values}", *_reason(each.choice, sources)]
    return "\n".join([*lines, *sources.lines()])


def recipe_text(advice: Advice, given: Mapping[str, Any], head: Sequence[str] = ()) -> str:
    """A recipe in YAML, above each advised line its reason. `given` are dotted keys that stand already."""
    reasons = {choice.key: choice.reason for choice in advice.choices if choice.key not in given}
    lines = [f"# {line}" for text in head for line in textwrap.wrap(text, WIDTH)]
    for name, value in advice.recipe(given).items():
        if not isinstance(value, dict):
            lines.append(_yaml({name: value}))
            continue
        lines.append(f"{name}:")
        for key, inner in value.items():
            why = reasons.get(f"{name}.{key}", "")
            lines += [f"  # {line}" for line in textwrap.wrap(why, WIDTH)]
            lines.append(textwrap.indent(_yaml({key: inner}), "  "))
    return "\n".join(lines) + "\n"


def _yaml(value: Mapping[str, Any]) -> str:
    """Numbers as YAML 1.1 reads them: it takes 2e-3 for a text, and safe_dump writes 0.002."""
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=1 << 20).rstrip("\n")


def value_text(value: Any) -> str:
    """A value for people."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else "–" if value is None else str(value)


class _Sources:
    """Numbers of sources in the order in which they are named."""

    def __init__(self) -> None:
        self._numbers: dict[Source, int] = {}

    def named(self, choice: Choice) -> str:
        """`[1,4]`: no line ends in it."""
        numbers = [self._numbers.setdefault(source, len(self._numbers) + 1) for source in choice.rule.sources]
        return f"[{','.join(map(str, numbers))}]"

    def lines(self) -> list[str]:
        """What the numbers stand for."""
        return ["", "Sources:", *(f"  [{number}] {source}" for source, number in self._numbers.items())]


def _answer(advice: Advice, told: Sequence[str], sources: _Sources) -> list[str]:
    lines = [ANSWERS[advice.answer.value], *_reason(advice.answer, sources), ""]
    return [*lines, "Given:", *(f"  {line}" for line in told), ""] if told else lines


def _reason(choice: Choice, sources: _Sources) -> list[str]:
    return [f"      {line}" for line in textwrap.wrap(f"{choice.reason} {sources.named(choice)}", WIDTH - 6)]
