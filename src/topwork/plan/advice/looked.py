"""What rows are like, from their texts alone: the task they seem to be for, and how long they are."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from topwork.data.conversations import Conversation

LETTERS_PER_TOKEN = 4.0
"""Of English text in a vocabulary of 30 to 150 thousand. Where a tokenizer is at hand, tokens are counted instead."""
TOKENS_PER_TURN = 5
"""What a chat template puts around a turn, about."""
FEW_ANSWERS, SHORT_ANSWER = 5, 60
"""Classification: an answer comes so often on average, and has so many letters at most."""
LEAST_ROWS = 20
LONG_PROMPT, PROMPT_PER_ANSWER = 1000, 5
"""Summarization: a prompt of so many letters, and so many times the answer's."""


@dataclass(frozen=True)
class Looked:
    """Rows at a glance. Tokens are estimated from letters; `why` says how the task was recognised."""

    task: str
    why: str
    kind: str
    turns: bool
    rows: int
    tokens_per_row: float
    longest: int
    learned_share: float


def look(rows: Sequence[Conversation]) -> Looked:
    """At rows that could be read; there is at least one."""
    tokens, learned = zip(*map(_tokens, rows))
    task, why = _task(rows)
    kind = "text" if all(row.kind == "text" for row in rows) else "messages"
    turns = any(len(_answers(row)) > 1 for row in rows)
    total = sum(tokens)
    return Looked(task, why, kind, turns, len(rows), total / len(rows), max(tokens), sum(learned) / total)


def _tokens(row: Conversation) -> tuple[int, int]:
    """All, and those that are learned."""
    if row.kind == "text":
        count = max(2, round(len(row.text or "") / LETTERS_PER_TOKEN))
        return count, count
    tools = len(json.dumps(row.tools)) if row.tools else 0
    said = [(message.role, len(message.content) + len(json.dumps(message.extra))) for message in row.messages]
    learned = sum(letters for role, letters in said if role == "assistant")
    letters = tools + sum(letters for _, letters in said)
    return (
        round(letters / LETTERS_PER_TOKEN) + TOKENS_PER_TURN * len(said),
        round(learned / LETTERS_PER_TOKEN) + 1,
    )


def _task(rows: Sequence[Conversation]) -> tuple[str, str]:
    if all(row.kind == "text" for row in rows):
        return "continued-pretraining", "plain text"
    if any(row.tools or any("tool_calls" in message.extra for message in row.messages) for row in rows):
        return "tool-calls", "rows have tools"
    answers = [answer for row in rows for answer in _answers(row)[-1:]]
    if answers and all(_is_object(answer) for answer in answers):
        return "extraction", "every answer is a JSON object"
    short, distinct = median(map(len, answers or [""])), len(set(answers))
    if len(answers) >= LEAST_ROWS and short <= SHORT_ANSWER and distinct * FEW_ANSWERS <= len(answers):
        return "classification", f"{distinct:,} different answers in {len(answers):,} rows"
    if sum(len(_answers(row)) for row in rows) > 1.5 * len(rows):
        return "chat-style", "conversations of several answers"
    asked = median(sum(len(m.content) for m in row.messages if m.role != "assistant") for row in rows)
    if asked >= LONG_PROMPT and asked >= PROMPT_PER_ANSWER * short:
        return "summarization", f"answers of {short:,.0f} letters for prompts of {asked:,.0f}"
    return "instruction", "prompts and answers of all kinds"


def _answers(row: Conversation) -> list[str]:
    return [message.content for message in row.messages if message.role == "assistant"]


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
