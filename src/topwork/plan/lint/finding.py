"""What a check says: the rule, how grave it is, which rows, and what to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "notice"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "notice")
"""From the gravest on."""


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    rule      a name of `rules.RULES`' checks, for programs: the same in every version
    severity  `error`: training refuses it, or learns something that nobody can want; `warning`: it spoils what is
              learned, or should not leave the house; `notice`: worth knowing, and often meant
    rows      the sources of all rows concerned, in the order in which they are read; empty where it is no row's fault
    count     how many there are, in the rule's own unit (`message` says which)
    message   what was found, with numbers
    remedy    what to do, in words that name the option or the step
    """

    rule: str
    severity: Severity
    message: str
    remedy: str
    rows: tuple[str, ...] = ()
    count: int = 0


def of_rows(
    rule: str, severity: Severity, rows: Sequence[str], total: int, what: str, remedy: str
) -> Finding:  # fmt: skip
    """A finding about rows: "3 of 500 rows (0.6%) <what>". A row that stands there twice counts once."""
    named = tuple(dict.fromkeys(rows))
    return Finding(rule, severity, f"{share_of(len(named), total)} {what}", remedy, named, len(named))


def share_of(count: int, total: int, unit: str = "row") -> str:
    """ "3 of 500 rows (0.6%)", "all 500 rows"."""
    if count == total > 1:
        return f"all {total:,} {unit}s"
    share = count / total if total else 0.0
    shown = f"{share:.1%}" if share >= 0.001 or not count else "less than 0.1%"
    return f"{count:,} of {total:,} {unit}{'' if total == 1 else 's'} ({shown})"


def graded(count: int, total: int, warning: float = 0.01, error: float | None = None) -> Severity:
    """By the share of rows: what a few rows in thousands have is a blemish, and what many have is learned."""
    share = count / total if total else 0.0
    if error is not None and share >= error:
        return "error"
    return "warning" if share >= warning else "notice"


def ordered(findings: Sequence[Finding]) -> list[Finding]:
    """The gravest first; those of one severity stay in the order of the rules."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def totals(findings: Sequence[Finding]) -> dict[Severity, int]:
    """How many there are of each severity."""
    return {severity: sum(finding.severity == severity for finding in findings) for severity in SEVERITIES}
