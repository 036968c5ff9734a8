"""How many tokens a recipe's rows are, without torch: counted by the base's tokenizer and chat template, as training
would (`data/examples.py`); of large files counted in a sample of rows; where no tokenizer is at hand, estimated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np

from topwork.common.errors import DataError
from topwork.data.chat.template import ChatTemplate
from topwork.data.config import DataConfig, SourceConfig, Sources, told
from topwork.data.conversations import Conversation
from topwork.data.examples import Data, load_data
from topwork.data.files.sources import with_held_out
from topwork.data.fitting import Fitting
from topwork.data.parts import part_of
from topwork.data.reading import encoded
from topwork.data.summary import refuse_bad
from topwork.models.light_tokenizer import LightTokenizer, tokenizer_folder
from topwork.plan.sampled_rows import SampledRows, sampled_rows
from topwork.recipe.recipe import Recipe

PERCENTILES = (50, 90, 99)
BYTES_PER_TOKEN = 4.0
"""Of UTF-8, where no tokenizer is at hand. SmolLM2's takes 4.03 of banking77's texts, 4.04 of hh_rlhf's, 3.83 of
e2e_nlg's, 3.61 of tool calls and 2.81 of GSM8K's, whose digits are tokens each (2026-11-30): up to 40 % under."""
TURN_TOKENS = 5
"""What a chat template writes around a message: ChatML, in SmolLM2's tokens, 5 around a user's and 6 around an
assistant's."""
Counted = Literal["all", "sample", "estimated"]


@dataclass(frozen=True)
class Tokens:
    """The training rows of a recipe, in one epoch.

    rows            that an epoch has, without those that are held out
    sequences       that become of them
    longest         tokens of the longest sequence that was seen, validation's among them, without virtual tokens
    percentiles     how long sequences are: of 50, 90 and 99 per cent of them none is longer
    attended        sum l^2 / sum l of their lengths: how long a sequence is that a token stands in
    held_out_rows   that are validated on, and their tokens
    counted         `all`: exactly; `sample`: told from `looked_at` rows; `estimated`: from their letters
    """

    rows: int
    sequences: int
    tokens: int
    learned_tokens: int
    longest: int
    percentiles: Mapping[int, int]
    attended: float
    held_out_rows: int
    held_out_tokens: int
    counted: Counted
    looked_at: int

    @property
    def learned_share(self) -> float:
        """Of the tokens, those that are learned."""
        return self.learned_tokens / self.tokens if self.tokens else 1.0

    def fullest_step(self, rows: int, steps: int) -> int:
        """Tokens of the largest of `steps` steps of so many rows, drawn at random: mean + sqrt(2 ln steps) deviations,
        where the largest of that many normal numbers lies; never more than the longest in each place."""
        mean = self.tokens / self.sequences
        deviation = math.sqrt(max(0.0, self.attended * mean - mean**2))
        largest = rows * mean + math.sqrt(2 * math.log(max(2, steps))) * deviation * math.sqrt(rows)
        return max(self.longest, min(math.ceil(largest), rows * self.longest))

    def as_json(self) -> dict[str, Any]:
        """Plain values under names that stay."""
        return asdict(self) | {"percentiles": {str(key): value for key, value in self.percentiles.items()}}

    def how(self) -> str:
        """How they were counted, for people."""
        if self.counted == "all":
            return "counted with the base's tokenizer"
        if self.counted == "sample":
            return f"from {self.looked_at:,} rows spread over the data, put into tokens"
        return f"estimated from letters in {self.looked_at:,} rows: no tokenizer of this base is on this machine"


def counted(recipe: Recipe, context_length: int) -> Tokens | None:
    """The rows of a recipe; None where they are on the Hub, which is not asked.

    context_length  of the base; sequences are no longer than it, less an adapter's virtual tokens, and data.max_length

    Raises DataError as reading them for training would.
    """
    config = with_held_out(recipe.data)
    room = context_length - recipe.adapter.virtual_tokens
    parts = _sampled(config, config.train, config.max_rows)
    apart = [] if config.eval is None else _sampled(config, config.eval, None)
    if parts is None or apart is None:
        return None
    tokenizer = _tokenizer(recipe)
    if tokenizer is not None and all(part.rows.whole for part in (*parts, *apart)):
        whole = recipe.data.model_copy(update={"streaming": False})
        return _all(load_data(whole, tokenizer, room, recipe.training.seed, lambda _: None))
    look = _Letters(config, room) if tokenizer is None else _Tokenized(config, tokenizer, room)
    train, held = _Side(config, parts, look), _Side(config, apart, look)
    look.check()
    if not len(train.lengths):
        raise DataError(f"{told(config.train)}: no row is left to train on")
    return _told_from(config, train, held, "estimated" if tokenizer is None else "sample")


def _tokenizer(recipe: Recipe) -> LightTokenizer | None:
    folder = tokenizer_folder(recipe.model)
    try:
        return None if folder is None else LightTokenizer(folder, recipe.model.new_tokens)
    except Exception:  # `tokenizers` raises Exception itself; training will tell what is wrong with the files
        return None


def _all(data: Data) -> Tokens:
    """What training itself would read."""
    counts, held = data.summary.train, data.summary.eval
    lengths = [len(example.tokens) for example in data.train]
    return Tokens(
        rows=counts.rows,
        sequences=counts.sequences,
        tokens=counts.tokens,
        learned_tokens=counts.learned_tokens,
        longest=data.longest(),
        percentiles=_percentiles(lengths),
        attended=_attended(lengths),
        held_out_rows=held.rows,
        held_out_tokens=held.tokens,
        counted="all",
        looked_at=counts.rows + held.rows,
    )


def _percentiles(lengths: Sequence[int], often: Sequence[float] | None = None) -> dict[int, int]:
    weights = None if often is None else np.asarray(often)
    found = np.percentile(np.asarray(lengths), PERCENTILES, method="inverted_cdf", weights=weights)
    return {percent: int(value) for percent, value in zip(PERCENTILES, found)}


def _attended(lengths: Sequence[int], often: Sequence[float] | None = None) -> float:
    found, weights = np.asarray(lengths, np.float64), np.ones(len(lengths)) if often is None else np.asarray(often)
    return float((weights * found**2).sum() / (weights * found).sum())


# From some of the rows


@dataclass(frozen=True)
class _Part:
    """A source and those of its rows that are looked at."""

    source: SourceConfig
    rows: SampledRows


def _sampled(config: DataConfig, named: Sources, max_rows: int | None) -> list[_Part] | None:
    found: list[_Part] = []
    left = max_rows
    for source in config.sources(named):
        if left == 0:
            break
        rows = sampled_rows(source, config.documents, left)
        if rows is None:
            return None
        left = None if left is None else left - rows.count
        found.append(_Part(source, rows))
    return found


class _Look(Protocol):
    """Conversations as sequences: (tokens, learned tokens) of each."""

    def __call__(self, conversations: Sequence[Conversation]) -> list[tuple[int, int]]: ...

    def check(self) -> None:
        """Raises DataError for sequences that the recipe refuses."""
        ...


class _Tokenized:
    """By the base's tokenizer and chat template."""

    def __init__(self, config: DataConfig, tokenizer: LightTokenizer, room: int) -> None:
        self.config, self.template = config, ChatTemplate.from_config(tokenizer, config)
        self.fitting = Fitting(config, self.template, min(config.max_length, room))

    def __call__(self, conversations: Sequence[Conversation]) -> list[tuple[int, int]]:
        fitted, bad = encoded(conversations, self.config, self.template, self.fitting)
        refuse_bad(bad, len(conversations), self.config)
        return [
            (len(item.tokens), sum(1 for weight in item.weights if weight))
            for row in fitted for item in row.sequences
        ]  # fmt: skip

    def check(self) -> None:
        self.fitting.check()


class _Letters:
    """By how many letters there are. Which are learned is as `data.train_on` has it; what is too long is cut."""

    def __init__(self, config: DataConfig, room: int) -> None:
        self.train_on, self.max_length = config.train_on, min(config.max_length, room)

    def __call__(self, conversations: Sequence[Conversation]) -> list[tuple[int, int]]:
        return [self._estimate(conversation) for conversation in conversations]

    def _estimate(self, conversation: Conversation) -> tuple[int, int]:
        if conversation.kind == "text":
            length = min(self.max_length, _about(conversation.text or "") + 1)
            return length, length - 1
        sizes = [_about(message.content) + TURN_TOKENS for message in conversation.messages]
        answers = [size - TURN_TOKENS + 1 for size, message in zip(sizes, conversation.messages)
                   if message.role == "assistant"]  # fmt: skip
        length = min(self.max_length, sum(sizes))
        learned = {"all": [length - 1], "last_answer": answers[-1:]}.get(self.train_on, answers)
        return length, min(length, sum(learned))

    def check(self) -> None:
        pass


def _about(text: str) -> int:
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN)


class _Side:
    """What was seen of training's or of validation's rows.

    lengths, learned  [sequences] tokens of each, and those of them that are learned
    often             [sequences] how many sequences of all rows each stands for
    """

    def __init__(self, config: DataConfig, parts: Sequence[_Part], look: _Look) -> None:
        self.lengths, self.learned, self.often = list[int](), list[int](), list[float]()
        self.rows, self.longest, self.looked_at = 0.0, 0, 0
        for part in parts:
            self._add(config, part, look)

    def _add(self, config: DataConfig, part: _Part, look: _Look) -> None:
        made = part_of(config, part.source, part.rows.rows)
        refuse_bad(made.bad, len(part.rows.rows), config)
        usable = len(made.conversations) / max(1, len(part.rows.rows))
        weight = part.rows.count / max(1, len(part.rows.rows)) * part.source.weight
        sizes = look(made.conversations)
        others = look(part_of(config, part.source, part.rows.longest).conversations) if part.rows.longest else []
        self.lengths += [length for length, _ in sizes]
        self.learned += [learned for _, learned in sizes]
        self.often += [weight] * len(sizes)
        self.rows += part.rows.count * usable * part.source.weight
        self.longest = max([self.longest, *(length for length, _ in (*sizes, *others))])
        self.looked_at += len(part.rows.rows)

    def total(self, values: Sequence[int]) -> int:
        """Of all rows, from those that were seen."""
        return round(float(np.dot(values, self.often))) if values else 0


def _told_from(config: DataConfig, train: _Side, held: _Side, how: Counted) -> Tokens:
    """What rows that are held out take with them is told from their share."""
    tokens, held_rows, held_tokens = train.total(train.lengths), held.rows, held.total(held.lengths)
    kept = 1.0
    if config.eval is None and config.eval_fraction and train.rows > 1:
        held_rows = min(max(1, round(train.rows * config.eval_fraction)), train.rows - 1)
        kept = 1 - held_rows / train.rows
        held_tokens = round(tokens * (1 - kept))
    return Tokens(
        rows=round(train.rows * kept),
        sequences=round(sum(train.often) * kept),
        tokens=round(tokens * kept),
        learned_tokens=round(train.total(train.learned) * kept),
        longest=max(train.longest, held.longest),
        percentiles=_percentiles(train.lengths, train.often),
        attended=_attended(train.lengths, train.often),
        held_out_rows=round(held_rows),
        held_out_tokens=held_tokens,
        counted=how,
        looked_at=train.looked_at + held.looked_at,
    )
