"""Conversations made shorter so that their answers fit: without their oldest turns, or without the middle of a message.

What is shortened is the conversation, which the template then renders again: markup stays whole, and so does every
answer that is learned. A way to shorten is a generator: it yields a conversation to try and is sent the sequences that
this becomes, so that those of many rows are tried in one call.
"""

import unicodedata
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from topwork.data.chat.template import ChatTemplate, Encoded, TrainOn
from topwork.data.conversations import Conversation, Message

MARK = " … "
"""Stands where the middle of a message was."""
KEPT = 16
"""Characters to which a message is shortened at most."""
_JOINER = "\N{ZERO WIDTH JOINER}"
_JOINS = {_JOINER, *map(chr, range(0xFE00, 0xFE10)), *map(chr, range(0x1F3FB, 0x1F400))}
_NEAR = 32  # a message is as long as it can be to within this part of max_length


@dataclass(frozen=True)
class Made:
    """A conversation and the sequences that it becomes; none where it cannot be made to fit."""

    conversation: Conversation
    sequences: list[Encoded]

    @property
    def longest(self) -> int:
        """In tokens."""
        return max((len(item.tokens) for item in self.sequences), default=0)


Steps = Generator[Conversation, list[Encoded], list[Made]]


def alone(row: Conversation, items: list[Encoded], train_on: TrainOn) -> list[Made]:
    """The row as one conversation for each of its sequences, with weight 0 for answers that another one learns."""
    answers = [number for number, message in enumerate(row.messages) if message.role == "assistant"]
    chosen = answers[-1:] if train_on == "last_answer" else answers
    learned = [number for number in chosen if row.messages[number].weight != 0]
    spans = [_spans(item.weights) for item in items]
    if train_on == "all":
        return [Made(row, items)]
    if len(items) == 1 or sum(spans) != len(learned):
        return [Made(_learning(row, learned), items)]
    found, first = [], 0
    for item, count in zip(items, spans):
        own = learned[first : first + count]
        found.append(Made(_learning(row, own), [item]))
        first += count
    return found


def _spans(weights: Sequence[float]) -> int:
    """How many stretches are learned."""
    return sum(1 for before, here in zip([0.0, *weights], weights) if here and not before)


def _learning(row: Conversation, learned: Sequence[int]) -> Conversation:
    """The conversation through the last of some answers, with weight 0 for the others."""
    kept = row.messages[: learned[-1] + 1] if learned else row.messages
    return replace(
        row,
        messages=tuple(
            replace(message, weight=0.0) if message.role == "assistant" and number not in learned else message
            for number, message in enumerate(kept)
        ),
    )


def is_learned(message: Message, train_on: TrainOn) -> bool:
    """Whether a message of what `alone` gives is learned."""
    return message.weight != 0 and (train_on == "all" or message.role == "assistant")


def _fits(items: Sequence[Encoded], max_length: int) -> bool:
    return bool(items) and all(len(item.tokens) <= max_length for item in items)


# Oldest turns


def without_oldest(whole: Made, train_on: TrainOn, max_length: int) -> Steps:
    """The newest exchanges that fit, behind the system message. Answers in what was left out are learned in sequences
    of their own, which begin where turns were left out of them in turn. An exchange that is too long by itself is left
    out with its answer."""
    head, exchanges = _exchanges(whole.conversation.messages)
    found: list[Made] = []
    stop = len(exchanges)
    while stop := _through_learned(exchanges, stop, train_on):
        best, low, high, more = stop, 0, stop - 1, 1  # the first exchange: found, and where it is looked for
        kept = Made(whole.conversation, [])
        while low <= high:
            start = max(low, best - more) if more else (low + high) // 2  # twice as many, until they are too many
            messages = (*head, *(message for exchange in exchanges[start:stop] for message in exchange))
            tried = replace(whole.conversation, messages=messages)
            items = yield tried
            if _fits(items, max_length):
                best, kept, high, more = start, Made(tried, items), start - 1, 2 * more
            else:
                low, more = start + 1, 0
        found.append(kept)
        stop = best if kept.sequences else stop - 1
    return found[::-1]


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system messages at the head, and the rest in exchanges: what is asked, and all that follows from it."""
    first = next((number for number, message in enumerate(messages) if message.role != "system"), len(messages))
    asks = ("system", "user")
    exchanges: list[list[Message]] = []
    for before, message in zip([None, *messages[first:]], messages[first:]):
        if before is None or (message.role in asks and before.role not in asks):
            exchanges.append([])
        exchanges[-1].append(message)
    return list(messages[:first]), exchanges


def _through_learned(exchanges: Sequence[Sequence[Message]], stop: int, train_on: TrainOn) -> int:
    """How many of the first `stop` exchanges there are through the last that is learned."""
    while stop and not any(is_learned(message, train_on) for message in exchanges[stop - 1]):
        stop -= 1
    return stop


# The middle


def without_middles(whole: Made, train_on: TrainOn, max_length: int) -> Steps:
    """Messages that are not learned, cut to as many characters as let all fit, the longest first; system messages only
    where that is not enough. Nothing is made where the answers alone leave no room."""
    free = [not is_learned(message, train_on) for message in whole.conversation.messages]
    system = [message.role == "system" for message in whole.conversation.messages]
    tried = whole
    for chosen in ([a and not b for a, b in zip(free, system)], [a and b for a, b in zip(free, system)]):
        tried = yield from _largest(tried, chosen, max_length)
        if _fits(tried.sequences, max_length):
            return [tried]
    return [Made(whole.conversation, [])]


def _largest(whole: Made, chosen: Sequence[bool], max_length: int) -> Generator[Conversation, list[Encoded], Made]:
    """The chosen messages at the largest size (characters, for all the same) at which all fits, nearly; at the smallest
    where not even that does."""
    high = max((len(m.content) for m, cut in zip(whole.conversation.messages, chosen) if cut), default=0)
    low, over, bisect = KEPT, whole.longest, False
    if high <= low:
        return whole
    least = _cut(whole.conversation, chosen, low)
    best = Made(least, (yield least))
    if not _fits(best.sequences, max_length):
        return best
    while high - low > 1 and best.longest < max_length - max_length // _NEAR:
        share = 0.5 if bisect or over <= best.longest else (max_length - best.longest) / (over - best.longest)
        size = min(max(low + int((high - low) * share), low + 1), high - 1)
        tried = _cut(whole.conversation, chosen, size)
        items = yield tried
        if _fits(items, max_length):
            low, best = size, Made(tried, items)
        else:
            high, over = size, max((len(item.tokens) for item in items), default=over)
        bisect = not bisect
    return best


def _cut(conversation: Conversation, chosen: Sequence[bool], size: int) -> Conversation:
    messages = (
        replace(message, content=without_middle(message.content, size)) if cut else message
        for message, cut in zip(conversation.messages, chosen)
    )
    return replace(conversation, messages=tuple(messages))


def without_middle(text: str, size: int) -> str:
    """About the first and the last size / 2 characters and a mark between them, at words where there are some."""
    if len(text) <= size:
        return text
    stop, start = size - size // 2, len(text) - size // 2
    while stop > 1 and _joined(text, stop):
        stop -= 1
    while start < len(text) - 1 and _joined(text, start):
        start += 1
    front, back = text[:stop], text[start:]
    if not (front[-1].isspace() or text[stop].isspace()):
        words = front.rsplit(None, 1)
        front = words[0] if len(words) > 1 and 3 * len(words[0]) >= len(front) else front
    if not (back[0].isspace() or text[start - 1].isspace()):
        words = back.split(None, 1)
        back = words[1] if len(words) > 1 and 3 * len(words[1]) >= len(back) else back
    return f"{front.rstrip()}{MARK}{back.lstrip()}"


def _joined(text: str, at: int) -> bool:
    """Whether a cut before this character would part one sign that people see."""
    here, before = text[at], text[at - 1]
    return bool(unicodedata.combining(here)) or here in _JOINS or before == _JOINER


# All at once


def shorten(
    parts: Sequence[Made], way: Literal["oldest_turns", "middle"], template: ChatTemplate, train_on: TrainOn,
    max_length: int,
) -> list[list[Made]]:  # fmt: skip
    """For each part of `alone` what it becomes; those without sequences could not be made to fit."""
    shortener = without_oldest if way == "oldest_turns" else without_middles
    steps = [shortener(part, train_on, max_length) for part in parts]
    found: list[list[Made]] = [[] for _ in parts]
    sent: dict[int, list[Encoded] | None] = dict.fromkeys(range(len(parts)))
    while sent:
        tried: dict[int, Conversation] = {}
        for number, items in sent.items():
            try:
                tried[number] = next(steps[number]) if items is None else steps[number].send(items)
            except StopIteration as ended:
                found[number] = ended.value
        encoded, _ = template.encode_all(list(tried.values()), "all" if train_on == "all" else "answers")
        sent = dict(zip(tried, encoded))
    return found
