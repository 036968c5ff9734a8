"""Prompt, retrieval or fine-tune."""

from topwork.plan.advice.rule import ANSWER, Case, Rule, Table, always, given
from topwork.plan.advice.sources import (
    BANKING,
    CHANGING_FACTS,
    GSM8K_METHODS,
    LEARNS_LESS,
    MICROSOFT_CHOICE,
    NEW_FACTS,
    OPENAI_AMOUNT,
    PROVENANCE,
    RETRIEVAL,
    SUPPORT,
)

FEW = 50
"""Examples from which fine-tuning is worth a try."""


def _few(case: Case) -> bool:
    text = case.facts.task == "continued-pretraining"  # a file of text may be one row
    return case.facts.rows is not None and case.facts.rows < FEW and not text


APPROACH: Table = (
    Rule(
        "knowledge-changes", ANSWER, "answers depend on what changes (goal changing-knowledge)",
        lambda case: "changing-knowledge" in case.facts.goals, "retrieval", given("retrieval"),
        "A trained model knows what its rows said on the day they were written; a document that is looked up is as new "
        "as the document. Fine-tune the form of the answers later, if a prompt does not get it.",
        (CHANGING_FACTS, MICROSOFT_CHOICE, RETRIEVAL),
    ),
    Rule(
        "sources-are-named", ANSWER, "answers have to name where they are from (goal citations)",
        lambda case: "citations" in case.facts.goals, "retrieval", given("retrieval"),
        "Weights hold no sources: a model that was trained on them makes them up. What was looked up can be named.",
        (PROVENANCE,),
    ),
    Rule(
        "facts-are-new", ANSWER, "the model should know facts that it does not know (goal new-facts)",
        lambda case: "new-facts" in case.facts.goals, "retrieval", given("retrieval"),
        "Facts that a base does not know are learned slowly in fine-tuning, and learning them makes it invent others; "
        "put before it, it reads them.",
        (NEW_FACTS, RETRIEVAL),
    ),
    Rule(
        "few-examples", ANSWER, f"fewer than {FEW} examples (not: documents)", _few, "prompt", given("prompt"),
        "So few fit into a prompt, where the next try costs a minute; improvements from fine-tuning begin at 50 to 100 "
        "good examples. Write them into the prompt, measure, and collect more.",
        (OPENAI_AMOUNT,),
    ),
    Rule(
        "one-of-a-few-answers", ANSWER, "classification", lambda case: case.facts.task == "classification",
        "fine-tune", given("fine-tune"),
        "One of a few answers is what small models learn best: 135 million parameters went from 0 to 85.7 % of 77 "
        "intents in one epoch, without a list of them in the prompt.",
        (BANKING,),
    ),
    Rule(
        "a-fixed-form", ANSWER, "extraction, tool calls, or the goal format",
        lambda case: case.facts.task in ("extraction", "tool-calls") or "format" in case.facts.goals,
        "fine-tune", given("fine-tune"),
        "A form is learned from a thousand rows where a prompt only asks for it: valid JSON went from 0 to 100 % of "
        "300 tickets, all five fields right from 0 to 51 %.",
        (SUPPORT,),
    ),
    Rule(
        "a-tone", ANSWER, "chat style, or the goal style",
        lambda case: case.facts.task == "chat-style" or "style" in case.facts.goals, "fine-tune", given("fine-tune"),
        "A tone is easier shown than told, and holds over a long conversation, where a prompt's hold fades.",
        (MICROSOFT_CHOICE, OPENAI_AMOUNT),
    ),
    Rule(
        "quick-or-cheap", ANSWER, "the goals latency or cost",
        lambda case: bool({"latency", "cost"} & case.facts.goals), "fine-tune", given("fine-tune"),
        "What is learned need not stand in every prompt, and a small model that was trained for one task does the work "
        "of a large one that is asked for it.",
        (BANKING, OPENAI_AMOUNT),
    ),
    Rule(
        "plain-text", ANSWER, "continued pretraining", lambda case: case.facts.task == "continued-pretraining",
        "fine-tune", given("fine-tune"),
        "The words and ways of a domain are learned from its text, while LoRA keeps more of what the base could before "
        "than training it whole does. Do not expect single facts of it.",
        (LEARNS_LESS,),
    ),
    Rule(
        "enough-examples", ANSWER, "else", always, "fine-tune", given("fine-tune"),
        "There are examples enough to learn from. Ask the bare base with your best prompt first (`topwork eval` "
        "measures both): what a prompt gives need not be trained.",
        (OPENAI_AMOUNT, GSM8K_METHODS),
    ),
)  # fmt: skip
