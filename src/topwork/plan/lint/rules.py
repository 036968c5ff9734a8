"""The table of checks, in the order in which equally grave findings are told."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from topwork.plan.lint import amount, content, damage, duplicates, lengths, order, secrets, spans, templates, unusable
from topwork.plan.lint.examined import Examined
from topwork.plan.lint.finding import Finding, ordered


class Rule(NamedTuple):
    """One check, and the rules by which its findings go; `quick` ones run before every training, on what is loaded
    already."""

    check: Callable[[Examined], Iterator[Finding]]
    quick: bool
    names: tuple[str, ...]


RULES: tuple[Rule, ...] = (
    Rule(unusable.refused, False, ("template-refuses",)),
    Rule(unusable.remarks, False, ("file-warnings",)),
    Rule(
        unusable.unusable,
        False,
        (
            "content-lost",
            "nothing-learned",
            "encoding-damage",
            "role-order",
            "empty-rows",
            "unusable-rows",
        ),
    ),
    Rule(spans.end_of_turn, True, ("end-of-turn",)),
    Rule(spans.end_inside, True, ("end-inside-answer",)),
    Rule(spans.double_bos, True, ("double-bos",)),
    Rule(spans.missing_bos, True, ("missing-bos",)),
    Rule(spans.nothing_learned, True, ("nothing-learned",)),
    Rule(unusable.content_lost, False, ("content-lost",)),
    Rule(lengths.too_long, False, ("truncation",)),
    Rule(order.role_order, True, ("role-order",)),
    Rule(content.special_tokens, True, ("special-tokens-in-text",)),
    Rule(content.foreign_markup, False, ("markup-in-text",)),
    Rule(
        templates.not_own,
        True,
        (
            "template-altered",
            "template-not-own",
        ),
    ),
    Rule(templates.inserts_system, False, ("template-inserts-system",)),
    Rule(templates.marks_that_are_no_tokens, False, ("template-marks-no-tokens",)),
    Rule(
        duplicates.leaks,
        True,
        (
            "test-rows-in-training",
            "eval-rows-in-test",
        ),
    ),
    Rule(duplicates.near_leaks, False, ("near-test-rows-in-training",)),
    Rule(duplicates.duplicates, True, ("duplicates",)),
    Rule(duplicates.contradictions, True, ("contradictions",)),
    Rule(duplicates.near_duplicates, False, ("near-duplicates",)),
    Rule(duplicates.dominating, True, ("dominating-answer",)),
    Rule(
        content.answers,
        False,
        (
            "placeholder-answers",
            "answer-repeats-prompt",
            "boilerplate-answers",
        ),
    ),
    Rule(content.empty_messages, False, ("empty-rows",)),
    Rule(
        damage.damage,
        True,
        (
            "encoding-mojibake",
            "encoding-replaced",
            "control-characters",
            "invisible-characters",
            "html-leftovers",
            "escaped-newlines",
        ),
    ),
    Rule(
        secrets.secrets,
        False,
        (
            "secrets",
            "payment-numbers",
            "personal-data",
        ),
    ),
    Rule(lengths.outliers, False, ("length-outliers",)),
    Rule(lengths.short_of_rows, False, ("not-all-rows",)),
    Rule(amount.few_for_the_rank, False, ("few-rows-for-the-rank",)),
    Rule(
        amount.few_rows,
        False,
        (
            "few-rows",
            "few-steps",
        ),
    ),
    Rule(unusable.changed, False, ("changed-rows",)),
    Rule(spans.end_is_not_eos, False, ("end-of-turn-is-not-eos",)),
    Rule(spans.pad_is_end, False, ("pad-is-end-of-turn",)),
)


def check(examined: Examined, quick: bool = False) -> list[Finding]:
    """All findings, the gravest first; with `quick` those of the cheap checks alone."""
    found = [finding for rule in RULES if rule.quick or not quick for finding in rule.check(examined)]
    return ordered(found)
