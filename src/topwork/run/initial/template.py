"""With which options a base's chat template takes the rows, and how long they then are in tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from topwork.common.errors import DataError
from topwork.data.chat.template import ChatTemplate, Encoded
from topwork.data.config import DataConfig
from topwork.data.conversations import BadRow, Conversation
from topwork.data.fitting import Fitting
from topwork.data.reading import encoded as encoded_to_fit
from topwork.data.summary import refuse_bad
from topwork.models.light_tokenizer import LightTokenizer
from topwork.run.initial.rows import BAD_SHARE, SeenRows

SAMPLE_LETTERS = 400_000
"""About so many letters are put into tokens, which takes half a second."""
EACH_SHAPE, LONGEST = 3, 16
"""Beside those drawn for their lengths: so many rows of each order of roles, and so many of the longest."""
_ROLES = 8
TRIED = 60
"""Rows that are made to fit, to see whether anything is left of them."""

FOLDED = "The model's template takes no system message; it goes to the head of the first question instead."
MERGED = "The template wants question and answer in turns; several of one role in a row are made one turn."
INLINE = "The template has no place for thinking; it goes into <think> tags before the answer, where it is learned."
CHATML = "The model's own template leaves out tools or calls; ChatML's writes them. The run keeps it for whoever asks."
NO_TEMPLATE = (
    "The base has no chat template, but it knows the marks of ChatML, which say who speaks and where turns end."
)
PLAIN = (
    "The base has no chat template. `plain` is question, new line, answer, and what it is asked with later is the same."
)
LETTERS = (
    "The base has no chat template, and these conversations need one that says who speaks. ChatML's does; its marks "
    "are letters to this tokenizer, and are learned like any."
)

Remedy = Mapping[str, tuple[Any, str]]
"""Options of `data`, each with its reason."""
_FOLD: Remedy = {"fold_system": (True, FOLDED)}
_MERGE: Remedy = {"merge_turns": (True, MERGED)}
_INLINE: Remedy = {"thinking": ("inline", INLINE)}
_CHATML: Remedy = {"chat_template": ("chatml", CHATML)}
REMEDIES: tuple[Remedy, ...] = (
    {}, _FOLD, _MERGE, {**_FOLD, **_MERGE}, _INLINE, {**_FOLD, **_INLINE}, _CHATML, {**_CHATML, **_INLINE},
    {**_CHATML, **_MERGE},
)  # fmt: skip
"""What may help where a template does not take rows, the least first."""


@dataclass(frozen=True)
class Lengths:
    """How long sequences are in tokens.

    drawn    [sequences] of rows from all over
    longest  of these and of the rows with the most letters
    answer   of the longest stretch that is learned
    """

    drawn: np.ndarray
    learned_share: float
    longest: int
    answer: int

    @property
    def mean(self) -> float:
        """Tokens of a sequence on average."""
        return float(self.drawn.mean())

    @property
    def percentiles(self) -> dict[int, int]:
        """How long sequences are: of 50, 90 and 99 per cent of them none is longer."""
        return {share: int(np.percentile(self.drawn, share, method="inverted_cdf")) for share in (50, 90, 99)}

    def longer(self, tokens: int) -> float:
        """The share of sequences that are longer."""
        return float((self.drawn > tokens).mean())


@dataclass(frozen=True)
class Taken:
    """How the template takes the rows: options of `data`, the reason of each, and what comes of it.

    bad     rows that it does not take even so
    picked  the rows that were put into tokens
    """

    options: dict[str, Any]
    reasons: dict[str, str]
    lengths: Lengths
    bad: list[BadRow]
    picked: list[Conversation]


def take_rows(rows: SeenRows, tokenizer: LightTokenizer) -> Taken:
    """With the first remedy with which the template takes all rows that are tried. Raises DataError where too many
    cannot be used with any of them."""
    picked, drawn = _picked(rows.conversations)
    best: tuple[Remedy, list[list[Encoded]], list[BadRow]] | None = None
    refused: DataError | None = None
    for remedy in _remedies(rows, tokenizer):
        try:
            encoded, bad = _encoded(rows, remedy, tokenizer, picked)
        except DataError as error:
            refused = refused or error
            continue
        if best is None or len(bad) < len(best[2]):
            best = remedy, encoded, bad
        if not bad:
            break
    if best is None:
        raise refused or DataError("the rows hold nothing to learn")
    remedy, encoded, bad = best
    if bad:
        _, bad = _encoded(rows, remedy, tokenizer, rows.conversations)
        if len(bad) + len(rows.bad) > BAD_SHARE * rows.seen:
            refuse_bad(bad, len(rows.conversations), rows.config)
    options = {key: value for key, (value, _) in remedy.items()}
    reasons = {key: why for key, (_, why) in remedy.items()}
    return Taken(options, reasons, _lengths(encoded, drawn), bad, picked)


def too_long(taken: Taken, config: DataConfig, tokenizer: LightTokenizer) -> tuple[int, int]:
    """How many rows have nothing left to learn once `config` has made them fit, of so many that were tried."""
    template, options = ChatTemplate.from_config(tokenizer, config), config.model_copy(update={"on_bad_row": "drop"})
    fitted, _ = encoded_to_fit(taken.picked[:TRIED], options, template, Fitting(options, template, config.max_length))
    return sum(not row.sequences for row in fitted), len(fitted)


def _remedies(rows: SeenRows, tokenizer: LightTokenizer) -> list[Remedy]:
    """Those that leave alone what the request has said."""
    given = rows.config.model_fields_set
    chats = any(row.kind == "chat" for row in rows.conversations)
    own = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
    tried: Sequence[Remedy] = REMEDIES
    if chats and tokenizer.chat_template is None and "chat_template" not in given:
        marks = {"<|im_start|>", "<|im_end|>"} <= own
        chatml: Remedy = {"chat_template": ("chatml", NO_TEMPLATE if marks else LETTERS)}
        plain: Remedy = {"chat_template": ("plain", PLAIN)}
        first = (chatml, plain) if marks or not all(map(_is_question, rows.conversations)) else (plain, chatml)
        tried = [{**template, **more} for template in first for more in ({}, _INLINE, _MERGE, {**_INLINE, **_MERGE})]
    return [remedy for remedy in tried if not given & remedy.keys()]


def _is_question(row: Conversation) -> bool:
    """Whether who speaks need not be said: one question and its answer, with an instruction before them at most."""
    return [message.role for message in row.messages if message.role != "system"] == ["user", "assistant"]


def _encoded(
    rows: SeenRows, remedy: Remedy, tokenizer: LightTokenizer, conversations: Sequence[Conversation]
) -> tuple[list[list[Encoded]], list[BadRow]]:
    options = rows.config.model_copy(update={key: value for key, (value, _) in remedy.items()})
    return ChatTemplate.from_config(tokenizer, options).encode_all(conversations, options.train_on)


def _picked(conversations: Sequence[Conversation]) -> tuple[list[Conversation], int]:
    """Rows to be put into tokens: some from all over, and how many these are; then some of each shape, and the
    longest."""
    letters = [_letters(row) for row in conversations]
    step = max(1, -(-sum(letters) // SAMPLE_LETTERS))
    drawn = Random(0)  # one of each stretch, not every so manieth: rows often repeat in a rhythm
    chosen = [drawn.randrange(at, min(at + step, len(letters))) for at in range(0, len(letters), step)]
    taken = set(chosen)
    shapes: dict[object, int] = {}
    for number, row in enumerate(conversations):
        shape = _shape(row)
        shapes[shape] = shapes.get(shape, 0) + 1
        if shapes[shape] <= EACH_SHAPE:
            taken.add(number)
    taken.update(sorted(range(len(letters)), key=lambda number: -letters[number])[:LONGEST])
    others = sorted(taken.difference(chosen))
    return [conversations[number] for number in (*chosen, *others)], len(chosen)


def _shape(row: Conversation) -> object:
    """What a template may stumble over."""
    roles = tuple(message.role for message in row.messages[:_ROLES])
    extra = frozenset(key for message in row.messages for key in message.extra)
    return row.kind, roles, bool(row.tools), extra


def _letters(row: Conversation) -> int:
    return len(row.text or "") + sum(len(message.content) + len(str(message.extra)) for message in row.messages)


def _lengths(encoded: Sequence[Sequence[Encoded]], drawn: int) -> Lengths:
    sequences = [item for items in encoded for item in items]
    of_drawn = [len(item.tokens) for items in encoded[:drawn] for item in items]
    tokens = sum(len(item.tokens) for item in sequences)
    learned = sum(sum(1 for weight in item.weights if weight) for item in sequences)
    return Lengths(
        drawn=np.asarray(of_drawn or [len(item.tokens) for item in sequences] or [1]),
        learned_share=learned / max(1, tokens),
        longest=max((len(item.tokens) for item in sequences), default=1),
        answer=max((_stretch(item.weights) for item in sequences), default=1),
    )


def _stretch(weights: Sequence[float]) -> int:
    """The longest run of weights that are not zero."""
    longest = run = 0
    for weight in weights:
        run = run + 1 if weight else 0
        longest = max(longest, run)
    return longest
