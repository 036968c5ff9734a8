"""The chat template: whether it is the base's own, what it writes that nobody gave, and what the vocabulary lacks."""

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path

from topwork.common.errors import DataError
from topwork.data.chat.template import ChatTemplate
from topwork.data.conversations import Conversation, Message
from topwork.plan.lint.examined import Examined
from topwork.plan.lint.finding import Finding, share_of

_SYSTEM, _USER, _ANSWER = "topworkprobesystem", "topworkprobeuser", "topworkprobeanswer"
_NEARLY = 0.8
"""How alike two templates are where one is the other, altered."""
_MARK = re.compile(r"<\|[A-Za-z_][\w-]*\|>|<(?:start|end)_of_turn>")


def not_own(examined: Examined) -> Iterator[Finding]:
    """Another template than the base was trained with; one altered by a character is told as that."""
    own, used = examined.facts.own_template, examined.template.jinja
    if examined.recipe.data.chat_template is None or own is None or used is None or own == used:
        return
    given = str(examined.recipe.data.chat_template)
    named = "data.chat_template" if "{" in given else Path(given).name
    nearly = SequenceMatcher(None, own, used, autojunk=False).ratio() >= _NEARLY if len(own) < 20_000 else False
    differs = _differs(examined)
    what = "is the base's own, altered" if nearly else "is not the base's own"
    remedy = "leave data.chat_template out to take the base's own"
    if not nearly:
        yield Finding(
            "template-not-own", "notice",
            f"the chat template ({named}) {what}: a model that was trained to chat answers best in its own"
            + (f"; a first difference in what is written: {differs}" if differs else ""),
            f"{remedy}, unless the base was never trained to chat",
        )  # fmt: skip
        return
    yield Finding(
        "template-altered", "warning" if differs else "notice",
        f"the chat template ({named}) {what} {first_difference(own, used)}; "
        + (f"it writes otherwise: {differs}" if differs else "a plain conversation comes out the same"),
        f"{remedy}, or make sure that the change is meant",
    )  # fmt: skip


def first_difference(own: str, used: str, width: int = 24) -> str:
    """ "at line 3, column 14: '…<|im_start|>…' is '…<|im_strat|>…'"."""
    at = next((n for n, (a, b) in enumerate(zip(own, used)) if a != b), min(len(own), len(used)))
    line = own.count("\n", 0, at) + 1
    column = at - (own.rfind("\n", 0, at) + 1) + 1
    start = max(0, at - width // 2)
    pieces = [repr(text[start : start + width]) for text in (own, used)]
    return f"at line {line}, column {column}: {pieces[0]} is {pieces[1]}"


def _differs(examined: Examined) -> str:
    """Where what the two templates write first differs, over a few plain conversations; empty where nowhere."""
    try:
        theirs = ChatTemplate(examined.tokenizer, examined.facts.own_template, examined.recipe.data.fold_system)
    except DataError:
        return ""
    for probe in _PROBES:
        own, used = (_written(template, probe) for template in (theirs, examined.template))
        if own != used:
            return first_difference(own, used, 60)
    return ""


_PROBES = (
    (Message("user", _USER), Message("assistant", _ANSWER)),
    (Message("system", _SYSTEM), Message("user", _USER), Message("assistant", _ANSWER)),
    (Message("user", _USER), Message("assistant", _ANSWER), Message("user", "more"), Message("assistant", "yes")),
)


def _written(template: ChatTemplate, messages: tuple[Message, ...]) -> str:
    """The conversation, and what generation is prompted with before its last answer."""
    try:
        sequences = [each.tokens for each in template.encode(Conversation(messages, None, "probe"), "all")]
        texts = [template.tokenizer.decode(tokens, skip_special_tokens=False) for tokens in sequences]
        return "".join([*texts, _prompt(template, messages[:-1])])
    except DataError as error:
        return f"refused: {error}"


def inserts_system(examined: Examined) -> Iterator[Finding]:
    """Text that the template puts before the first user's turn although the row says nothing of the kind."""
    rows = [
        row.source for side in examined.sides for row in side.conversations
        if row.kind == "chat" and not any(message.role == "system" for message in row.messages)
    ]  # fmt: skip
    inserted = inserted_text(examined.template) if rows else ""
    if inserted:
        yield Finding(
            "template-inserts-system", "notice",
            f"{share_of(len(rows), examined.total)} without a system message get one that the template brings: "
            f"{inserted[:160]!r}",
            "nothing where the model is asked the same way later (chat, serve and evaluation are); data.system gives "
            "another",
            tuple(rows), len(rows),
        )  # fmt: skip


def inserted_text(template: ChatTemplate) -> str:
    """What the template writes of its own in a system message's place, or words before the user's; empty for none."""
    try:
        alone = _prompt(template, (Message("user", _USER),))
    except DataError:
        return ""
    before = alone.partition(_USER)[0]
    try:
        given = _prompt(template, (Message("system", _SYSTEM), Message("user", _USER)))
    except DataError:
        given = ""
    head, there, tail = given.partition(_SYSTEM)
    tail = tail.partition(_USER)[0]
    if there and before.startswith(head) and before.endswith(tail) and len(before) > len(head) + len(tail):
        return before[len(head) : len(before) - len(tail)].strip()
    words = re.sub(r"<[^<>]*>|\[/?\w+\]", " ", before)
    return words.strip() if len(re.findall(r"[^\W\d_]{2,}", words)) > 3 else ""


def _prompt(template: ChatTemplate, messages: tuple[Message, ...]) -> str:
    return str(template.tokenizer.decode(template.prompt_ids(messages), skip_special_tokens=False))


def marks_that_are_no_tokens(examined: Examined) -> Iterator[Finding]:
    """Marks of turns that the vocabulary does not have: they are learned letter by letter."""
    if examined.template.jinja is None:
        return
    marks = [
        mark for mark in dict.fromkeys(_MARK.findall(examined.template.jinja)) if mark not in examined.facts.special
    ]
    spelled = [mark for mark in marks if len(examined.tokenizer(mark, add_special_tokens=False)["input_ids"]) > 1]
    if spelled and examined.train.conversations and examined.train.conversations[0].kind == "chat":
        yield Finding(
            "template-marks-no-tokens", "notice",
            f"the chat template writes {', '.join(spelled[:4])}, which this vocabulary does not have as tokens: they "
            "are spelled in several, and the EOS ends the turn",
            "nothing where a base is taught to chat; else look whether template and base belong together",
        )  # fmt: skip
