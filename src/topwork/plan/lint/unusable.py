"""Rows that cannot be used, rows of which something is left out, and answers that the template does not show whole."""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from topwork.data.chat.thinking import extra_thought, without_thinking
from topwork.data.conversations import BadRow, Conversation, Message
from topwork.data.summary import WARNING
from topwork.plan.lint.examined import Examined, Side
from topwork.plan.lint.finding import Finding, Severity, graded, of_rows

_KINDS = (
    ("content-lost", ("leaves out", "left out", "lost", "strips", "does not show", "stands nowhere")),
    ("nothing-learned", ("nothing to learn", "weight 0")),
    ("encoding-damage", ("surrogate",)),
    ("role-order", ("role", "the assistant's", "rejects these messages", "the last message is")),
    ("empty-rows", ("empty", "missing", "no answer", "no question", "no text")),
)
"""Rule -> what the reason of a bad row says. The reasons are sentences for people, so the first that fits."""
_TAG = re.compile(r"</?think>")
AT_ONCE = 2000


def unusable(examined: Examined) -> Iterator[Finding]:
    """Bad rows by reason. Training refuses them, or drops them by `data.on_bad_row`."""
    dropped = examined.recipe.data.on_bad_row == "drop"
    for side in examined.sides:
        groups: dict[tuple[str, str], list[BadRow]] = {}
        for bad in side.bad:
            groups.setdefault((_rule_of(bad.reason), _alike(bad.reason)), []).append(bad)
        for (rule, _), rows in groups.items():
            severity: Severity = graded(len(rows), side.rows) if dropped else "error"
            who = "evaluation" if side.name == "test" else "training"
            does = "data.on_bad_row: drop leaves them out" if dropped else f"{who} refuses them"
            yield of_rows(
                rule, severity, [row.source for row in rows], side.rows,
                f"cannot be used ({does}): {rows[0].reason}",
                "nothing, or correct them" if dropped else "correct them, or set data.on_bad_row: drop",
            )  # fmt: skip


def _rule_of(reason: str) -> str:
    return next((rule for rule, words in _KINDS if any(word in reason for word in words)), "unusable-rows")


def _alike(reason: str) -> str:
    """The reason without what differs from row to row."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+|(?<=tool call )\S+|(?<=tools, )\S+", "…", reason)


def changed(examined: Examined) -> Iterator[Finding]:
    """What was left out or changed on the way, as reading and rendering themselves tell it."""
    for side in examined.sides:
        groups: dict[str, list[str]] = {}
        for source, note in side.notes:
            groups.setdefault(note, []).append(source)
        for note, sources in groups.items():
            yield of_rows(
                "changed-rows", "notice", sources, side.rows, f"are not learned as they stand: {note}",
                "nothing where that is meant; else change the rows or the option that it names",
            )  # fmt: skip


def refused(examined: Examined) -> Iterator[Finding]:
    """What the recipe asks of the template and it cannot do for any row."""
    if examined.refused is not None:
        yield Finding(
            "template-refuses", "error", f"training would refuse these data: {examined.refused}",
            "do what the message says; the checks of tokens were left out",
        )  # fmt: skip


def remarks(examined: Examined) -> Iterator[Finding]:
    """What reading the files warned of."""
    for side in examined.sides:
        for remark in side.remarks:
            if remark.startswith(WARNING):
                yield Finding(
                    "file-warnings", "warning", remark.removeprefix(WARNING),
                    f"look at what {side.named} is, and name the files that are meant",
                )  # fmt: skip


# An own look, at the tokens, whatever the rendering says


def content_lost(examined: Examined) -> Iterator[Finding]:
    """Text of a learned answer that is in none of the row's learned tokens."""
    data = examined.recipe.data
    rows: list[str] = []
    for side in (examined.train, examined.eval):
        if side is not None and len(side.sequences):
            rows += _lost(examined, side)
    if rows:
        yield of_rows(
            "content-lost", "notice" if data.lost_text == "allow" else "error", rows, examined.total,
            "have an answer of which the learned tokens do not hold all: the template leaves out or changes its text",
            "take a template that writes it (data.chat_template: chatml), put thinking into the answer "
            "(data.thinking: inline), or say that it is meant (data.lost_text: allow, data.thinking: drop)",
        )  # fmt: skip


def _lost(examined: Examined, side: Side) -> list[str]:
    found, lost = side.sequences, []
    firsts = np.searchsorted(found.rows, np.arange(len(side.conversations) + 1))
    for start in range(0, len(side.conversations), AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, len(side.conversations)))
        spans = [found.bounds[firsts[number]] for number in numbers]
        stops = [found.bounds[firsts[number + 1]] for number in numbers]
        learned = [found.tokens[a:b][found.learned[a:b]].tolist() for a, b in zip(spans, stops)]
        texts = _decoded(examined.tokenizer, learned)
        for number, text in zip(numbers, texts):
            row = side.conversations[number]
            if text and not _holds(text, row, examined):
                lost.append(row.source)
    return lost


def _decoded(tokenizer: Any, tokens: list[list[int]]) -> list[str]:
    """Texts of token ids, special tokens included; by the library below transformers where there is one, which looks
    at every number to find out what it is."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return list(backend.decode_batch(tokens, skip_special_tokens=False))
    return list(tokenizer.batch_decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _holds(text: str, row: Conversation, examined: Examined) -> bool:
    wanted = _said(row, examined)
    if all(said in text for said in wanted):
        return True
    bare = _bare(text)  # without the tags: a template may open the thinking itself, in the prompt
    return all(_bare(said) in bare or _bare(json.dumps(said, ensure_ascii=False)[1:-1]) in bare for said in wanted)


def _said(row: Conversation, examined: Examined) -> list[str]:
    """What of a row has to stand among its learned tokens."""
    data = examined.recipe.data
    learned: Sequence[Message] = [each for each in row.messages if each.role == "assistant" and each.weight != 0]
    if data.train_on == "last_answer":
        learned = learned[-1:]
    if data.thinking == "drop":
        said = [without_thinking(each.content) for each in learned]
    else:
        said = [text for each in learned for text in (each.content, *extra_thought(each.extra))]
    return [text.strip() for text in said if text.strip()]


def _bare(text: str) -> str:
    """Letters as any tokenizer gives them back: no white space, no tags of thinking, one way of writing each."""
    return "".join(unicodedata.normalize("NFKC", _TAG.sub("", text)).split()).casefold()
