"""What rows say: markup in their text, answers that say nothing, boilerplate."""

import re
from collections.abc import Iterator

from topwork.data.conversations import Conversation
from topwork.plan.lint.examined import Examined, answer_of, squeezed
from topwork.plan.lint.finding import Finding, Severity, graded, of_rows

_FOREIGN = re.compile(
    r"<\|im_(?:start|end)\|>|<\|(?:begin_of_text|end_of_text|eot_id|endoftext|start_header_id|end_header_id|eom_id)\|>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|<\|(?:user|assistant|system|end|im_sep)\|>"
    r"|(?m:^### ?(?:Human|Assistant|Instruction|Response|User):)"
)
"""The marks by which well-known templates open and close turns."""
_BOILERPLATE = re.compile(
    r"\bas an? (?:large )?(?:AI|artificial intelligence)(?: language)? (?:model|assistant)\b"
    r"|\bI(?:['’]m| am) (?:sorry|afraid), (?:but )?(?:as an AI|I (?:can(?:'|’)?t|cannot|am unable to|am not able to)) "
    r"|\bI (?:cannot|can(?:'|’)t) (?:fulfil|fulfill|comply with|assist with) (?:this|that|your) request\b"
    r"|\bmy (?:knowledge cutoff|training data (?:only )?goes up to)\b|\bknowledge cutoff (?:date )?(?:is|of)\b",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"nan|null|n/?a|none|undefined|todo|tbd|fixme|lorem ipsum\b.*|\[?(?:insert|your) [a-z ]+here\]?|#n/a|-+|\.+|\?+",
    re.IGNORECASE,
)


def special_tokens(examined: Examined) -> Iterator[Finding]:
    """Text that spells the model's own control tokens."""
    known = [text for text in examined.facts.special if len(text) > 2]
    if not known:
        return
    spelled = re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))))
    rows, seen = [], dict[str, None]()
    for side in examined.sides:
        for row, role, text in side.texts():
            found = spelled.findall(text) if role != "text" else ()
            if found:
                rows.append(row.source)
                seen |= dict.fromkeys(found)
    if not rows:
        return
    markup = examined.recipe.data.split_special_tokens is False
    severity: Severity = "error" if markup else graded(len(set(rows)), examined.total)
    does = (
        "data.split_special_tokens: false reads them as markup, so they forge turns and ends of answers" if markup
        else "they are read as letters"
    )  # fmt: skip
    yield of_rows(
        "special-tokens-in-text", severity, rows, examined.total,
        f"spell special tokens of this model in their own text ({', '.join(list(seen)[:4])}); {does}",
        "take them out where they are left over from another rendering; where the whole text is rendered already, give "
        "it as plain text (data.format: text)",
    )  # fmt: skip


def foreign_markup(examined: Examined) -> Iterator[Finding]:
    """Text that was rendered by some template already, and is rendered again."""
    own = set(examined.facts.special)
    rows, seen = [], dict[str, None]()
    for side in examined.sides:
        for row, role, text in side.texts():
            if role == "text" or not ("<" in text or "[" in text or "#" in text):
                continue
            found = [mark for mark in _FOREIGN.findall(text) if mark not in own]
            if found:
                rows.append(row.source)
                seen |= dict.fromkeys(found)
    if rows:
        yield of_rows(
            "markup-in-text", graded(len(set(rows)), examined.total), rows, examined.total,
            f"hold marks of some chat template in a message ({', '.join(list(seen)[:4])}): two turns in one, or a text "
            "that was rendered before",
            "give the turns as messages of their own, or the whole as plain text (data.format: text, with "
            "data.response_part to learn the answers alone)",
        )  # fmt: skip


def answers(examined: Examined) -> Iterator[Finding]:
    """Answers that repeat their question, hold the place of one, or are a model's boilerplate."""
    repeats, places, boilerplate = [], [], []
    chats = [
        row for side in (examined.train, examined.eval) if side for row in side.conversations if row.kind == "chat"
    ]
    for row in chats:
        answer = answer_of(row)
        if _PLACEHOLDER.fullmatch(answer.strip()):
            places.append(row.source)
        elif len(answer) > 3 and squeezed(answer).casefold() == squeezed(_asked(row)).casefold():
            repeats.append(row.source)
        if ("AI" in answer or "I " in answer or "nowledge" in answer) and _BOILERPLATE.search(answer):
            boilerplate.append(row.source)
    total = len(chats)
    if places:
        yield of_rows(
            "placeholder-answers", graded(len(places), total, 0.01) if len(places) < 0.2 * total else "notice", places,
            total, "have an answer that holds the place of one (nan, None, N/A, TODO, …)",
            "leave the rows out, or give them an answer; nothing where it is the name of a class",
        )  # fmt: skip
    if repeats:
        yield of_rows(
            "answer-repeats-prompt", graded(len(repeats), total, 0.05), repeats, total,
            "have an answer that is the question again", "look whether columns are mapped twice (data.columns)",
        )  # fmt: skip
    if boilerplate:
        yield of_rows(
            "boilerplate-answers", graded(len(boilerplate), total, 0.2), boilerplate, total,
            'refuse or speak as another model ("As an AI language model …")',
            "leave them out unless refusing is what is to be learned",
        )  # fmt: skip


def _asked(row: Conversation) -> str:
    return next((message.content for message in reversed(row.messages) if message.role == "user"), "")


def empty_messages(examined: Examined) -> Iterator[Finding]:
    """Messages without text beside those that make a row unusable: an empty system message, an empty tool's result."""
    rows = [
        row.source for side in examined.sides for row in side.conversations
        if any(not message.content.strip() and not message.extra.get("tool_calls") for message in row.messages)
    ]  # fmt: skip
    if rows:
        yield of_rows(
            "empty-rows", graded(len(rows), examined.total), rows, examined.total, "have a message without text",
            "give it a text, or leave the message out",
        )  # fmt: skip
