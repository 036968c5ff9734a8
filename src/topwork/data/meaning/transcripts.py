"""Talks that stand otherwise than as a list of messages: a row for each message, or one text of all turns."""

from collections.abc import Iterable
from typing import Any

from topwork.common.errors import DataError
from topwork.data.config import DataConfig
from topwork.data.conversations import CONTENT_KEYS, ROLE_KEYS, Spelling
from topwork.data.meaning.columns import Columns
from topwork.data.meaning.fields import KNOWN_AS, plain

_MOST = 0.8  # of the rows seen
_BELONGS = ("conversation", "conv", "thread", "session", "dialog", "chat", "parent", "tree", "group")
MARKERS = (
    ("### Human:", "### Assistant:"),
    ("### User:", "### Assistant:"),
    ("### Instruction:", "### Response:"),
    ("<human>:", "<bot>:"),
    ("<|user|>", "<|assistant|>"),
    ("<|im_start|>user", "<|im_start|>assistant"),
    ("[INST]", "[/INST]"),
    ("USER:", "ASSISTANT:"),
    ("User:", "Assistant:"),
    ("Human:", "Assistant:"),
)
"""What stands before a question and before an answer in rendered text, the surest first."""


def refuse_lone_messages(survey: Columns, config: DataConfig) -> None:
    """Raises DataError where each row is one message, unless the recipe says how a row is read: a conversation must be
    in one row, and an answer is not learned without its question."""
    if config.format != "auto" or config.columns:
        return
    role = next((name for name in survey.names if plain(name) in ROLE_KEYS and _says_roles(name, survey, config)), None)
    content = next(
        (name for name in survey.names if plain(name) in CONTENT_KEYS and survey.by_name[name].is_text), None
    )
    if role is None or content is None:
        return
    belongs = next((n for n in survey.names if any(word in plain(n) for word in _BELONGS)), None)
    by = f", those with the same {belongs}" if belongs else ""
    raise DataError(
        f"each row is one message (its columns {role} and {content} say who speaks and what), and a row must be a "
        f"whole conversation; put the messages of one{by} into a list: "
        '{"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}'
    )


def _says_roles(name: str, survey: Columns, config: DataConfig) -> bool:
    """Whether a column holds roles alone, the assistant's among others."""
    column, spelling = survey.by_name[name], Spelling(config.roles, config.message_keys)
    roles = {spelling.role(value) for value in column.distinct}
    return column.is_text and None not in roles and "assistant" in roles and len(roles) > 1


def rendered_talks(survey: Columns) -> Iterable[dict[str, Any]]:
    """Options by which a text of all turns is learned, its answers alone."""
    system = next((name for name in survey.names if plain(name) in KNOWN_AS["system"]), None)
    for name in survey.names:
        if not survey.by_name[name].is_text:
            continue
        cells = [str(row.fields.get(name) or "") for row in survey.sample]
        for asks, answers in MARKERS:
            if sum(0 <= cell.find(asks) < cell.find(answers) for cell in cells) >= _MOST * len(cells):
                text = name if system in (None, name) else f"{{{system}?}}\n\n{{{name}}}"
                yield {"columns": {"text": text}, "response_part": answers, "instruction_part": asks}
                break
