"""The table of rules. Of those that decide the same, the first that applies does; what a rule reads of others' choices
stands above it."""

from topwork.plan.advice.adapter import ADAPTER, METHOD
from topwork.plan.advice.approach import APPROACH
from topwork.plan.advice.rows import ROWS
from topwork.plan.advice.rule import Table
from topwork.plan.advice.training import TRAINING

SECTIONS: dict[str, Table] = {
    "Prompt, retrieval or fine-tune": APPROACH,
    "Method": METHOD,
    "Rows": ROWS,
    "Batch, epochs and learning rate": TRAINING,
    "Adapter and base": ADAPTER,
}
"""By what they are about."""

RULES: Table = tuple(rule for section in SECTIONS.values() for rule in section)
