"""The table of checks, in the order in which equally grave findings are told."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from topwork.plan.lint import amount, content, damage, duplicates, lengths, order, secrets, spans, templates, unusable
from topwork.plan.lint.examined import Examined
from topwork.plan.lint.finding import Finding, ordered


class Rule(NamedTuple):
    """One check; `quick` ones run before every training, on what is loaded already."""

    check: Callable[[Examined], Iterator[Finding]]
    quick: bool


RULES: tuple[Rule, ...] = (
    Rule(unusable.refused, False),
    Rule(unusable.unusable, False),
    Rule(spans.end_of_turn, True),
    Rule(spans.end_inside, True),
    Rule(spans.double_bos, True),
    Rule(spans.missing_bos, True),
    Rule(spans.nothing_learned, True),
    Rule(unusable.content_lost, False),
    Rule(lengths.too_long, False),
    Rule(order.role_order, True),
    Rule(content.special_tokens, True),
    Rule(content.foreign_markup, False),
    Rule(templates.not_own, True),
    Rule(templates.inserts_system, False),
    Rule(templates.marks_that_are_no_tokens, False),
    Rule(duplicates.leaks, True),
    Rule(duplicates.near_leaks, False),
    Rule(duplicates.duplicates, True),
    Rule(duplicates.contradictions, True),
    Rule(duplicates.near_duplicates, False),
    Rule(duplicates.dominating, True),
    Rule(content.answers, False),
    Rule(content.empty_messages, False),
    Rule(damage.damage, True),
    Rule(secrets.secrets, False),
    Rule(lengths.outliers, False),
    Rule(lengths.twice_named, False),
    Rule(lengths.short_of_rows, False),
    Rule(amount.few_for_the_rank, False),
    Rule(amount.few_rows, False),
    Rule(unusable.changed, False),
    Rule(spans.end_is_not_eos, False),
    Rule(spans.pad_is_end, False),
)


def check(examined: Examined, quick: bool = False) -> list[Finding]:
    """All findings, the gravest first; with `quick` those of the cheap checks alone."""
    found = [finding for rule in RULES if rule.quick or not quick for finding in rule.check(examined)]
    return ordered(found)
