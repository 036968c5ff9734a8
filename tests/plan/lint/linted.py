"""Rows that are clean, and what the rules say of rows."""

from typing import Any

from topwork.plan.lint.examined import Examined
from topwork.plan.lint.finding import Finding
from topwork.plan.lint.rules import RULES, check

CONTEXT = 512
_THINGS = ("kettle", "lamp", "radio", "scale", "fan", "clock", "toaster", "mixer")
_ASKED = (
    "Which guarantee does my {0} number {1} have?",
    "The {0} I bought in week {1} hums at night.",
    "Where do I send back {0} {1}?",
    "Please change my order {1}: one {0} more.",
    "Do you have the {0} in size {1}?",
    "How loud is the new {0} at step {1}?",
)
_SAID = (
    "It has {1} months, counted from the day of purchase.",
    "Turn the screw below the {0} by {1} degrees.",
    "To our shop in Linden, hall {1}.",
    "Done: {1} of them will come on Friday.",
    "Yes, {1} are on the shelf.",
    "About {1} decibels, as loud as a {0} may be.",
)


def clean_rows(count: int = 60) -> list[dict[str, Any]]:
    """Rows of which none repeats, contradicts or hides anything."""
    made = []
    for number in range(count):
        thing, kind = _THINGS[number % len(_THINGS)], number % len(_ASKED)
        made.append(pair(_ASKED[kind].format(thing, number + 10), _SAID[kind].format(thing, number * 7 + 3)))
    return made


def pair(asked: str, said: str, system: str = "Be brief and kind.") -> dict[str, Any]:
    """One row of three messages."""
    turns = (("system", system), ("user", asked), ("assistant", said))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


class Linted:
    """What the rules said of some rows."""

    def __init__(self, examined: Examined) -> None:
        self.examined = examined
        self.findings = check(examined)
        assert {finding.rule for finding in self.findings} <= {name for rule in RULES for name in rule.names}

    def of(self, rule: str) -> Finding:
        """The one finding of a rule."""
        (found,) = [finding for finding in self.findings if finding.rule == rule]
        return found

    @property
    def grave(self) -> list[tuple[str, str]]:
        """(severity, rule) of errors and warnings."""
        return [(each.severity, each.rule) for each in self.findings if each.severity != "notice"]
