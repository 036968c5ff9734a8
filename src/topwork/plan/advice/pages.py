"""The same table as a page, as a prompt for any assistant, and as a skill's folder for agents."""

from topwork.plan.advice.facts import GOALS, TASKS
from topwork.plan.advice.rule import ANSWER, Rule, Table
from topwork.plan.advice.table import SECTIONS

SKILL = "fine-tuning-advice"
DESCRIPTION = (
    "Decide between prompting, retrieval and fine-tuning a language model, and choose a LoRA fine-tuning's method, "
    "rank, alpha, targets, learning rate, epochs, batch, lengths and validation, each with its reason and source. Use "
    "when somebody asks whether or how to fine-tune, or shows a fine-tuning configuration."
)
ORDER = "Of the rules that decide the same, the first that applies does; go through them in this order."


def rules_page(heading: str = "##") -> str:
    """All rules by section, each with when, what, why and from where."""
    return "\n".join(line for title, rules in SECTIONS.items() for line in _section(title, rules, heading))


def prompt() -> str:
    """The knowledge as a prompt for any assistant."""
    return "\n".join([
        "You advise on fine-tuning language models. Give the answer first (prompt, retrieval or fine-tune), then",
        "each setting with its reason. Ask for what you need and do not know: the task, how many examples, how long",
        "they are in tokens, the base model's hidden width, the memory at hand, and what matters (below). Keep to",
        "the rules; say so where none applies, and do not invent sources: those marked \"from memory\" were not read",
        "again.",
        "",
        *_words("Tasks", TASKS),
        *_words("What may matter", GOALS),
        ORDER,
        "",
        rules_page(),
    ])  # fmt: skip


def skill_files() -> dict[str, str]:
    """A skill's files by their paths in its folder: SKILL.md, and the rules beside it."""
    body = "\n".join([
        "---", f"name: {SKILL}", f"description: {DESCRIPTION}", "---", "",
        "# Fine-tuning advice", "",
        "1. Learn the facts: the task, how many examples, their lengths in tokens, the base model and its hidden",
        "   width, the memory at hand, and what matters. Look into the data file where there is one.",
        "2. Go through [references/rules.md](references/rules.md) in its order: of the rules that decide the same, the",
        "   first that applies does. Compute what they compute; do not round a learning rate to a habit.",
        "3. Answer first (prompt, retrieval or fine-tune), then each setting with its reason and its source as it",
        "   stands there. A source marked \"from memory\" was not read again: say so. Say where no rule applies.",
        "4. Where Topwork is installed, let it do the same: `topwork advise --task … --data … --model …`, or",
        "   `topwork advise RECIPE` for what a recipe does otherwise; `--out recipe.yaml` writes one that trains.",
        "",
        *_words("Tasks", TASKS),
        *_words("What may matter", GOALS),
    ])  # fmt: skip
    rules = f"# Rules of fine-tuning advice\n\n{ORDER}\n\n{rules_page()}"
    return {"SKILL.md": body.rstrip("\n") + "\n", "references/rules.md": rules.rstrip("\n") + "\n"}


def _words(title: str, words: object) -> list[str]:
    assert hasattr(words, "items")
    return [f"{title}:", "", *(f"- `{name}`: {meaning}" for name, meaning in words.items()), ""]


def _section(title: str, rules: Table, heading: str) -> list[str]:
    return [f"{heading} {title}", "", *(line for rule in rules for line in _rule(rule))]


def _rule(rule: Rule) -> list[str]:
    what = "the answer" if rule.decides == ANSWER else f"`{rule.decides}`"
    return [
        f"- **{rule.name}**: {what} is **{rule.what}**. When: {rule.when}.",
        f"  {rule.why}",
        *(f"  - {source.text} ({source.how}, {source.date})" for source in rule.sources),
        "",
    ]
