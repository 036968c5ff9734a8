"""A recipe's data as examples: token ids and the weights with which they are learned, counted and reported."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from topwork.common.errors import DataError
from topwork.data.config import DataConfig, told
from topwork.data.conversations import BadRow, Conversation
from topwork.data.formats import refuse_bad
from topwork.data.parts import Part, read_parts
from topwork.data.sources import memory_notes, with_held_out
from topwork.data.template import ChatTemplate, Encoded


@dataclass(frozen=True, eq=False)
class Example:
    """A sequence. weights[i] is the weight with which tokens[i] is learned from tokens[:i]; weights[0] is 0.

    tokens   [T] int32
    weights  [T] float32
    source   the row it comes from, for people
    columns  by name [T] float32: what else an objective reads of each learned token
    group    those with the same one (a pair, the answers to one prompt) stay in one pass, side by side and in the order
             in which the step has them; None where it belongs to nobody
    """

    tokens: np.ndarray
    weights: np.ndarray
    source: str
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    group: str | int | None = None

    def __post_init__(self) -> None:
        """Raises DataError where lengths differ, there are no tokens, or the first is to be learned from nothing."""
        lengths = {"weights": len(self.weights), **{name: len(column) for name, column in self.columns.items()}}
        wrong = [f"{length} {name}" for name, length in lengths.items() if length != len(self.tokens)]
        if wrong or not len(self.tokens):
            raise DataError(f"{self.source}: {len(self.tokens)} tokens, and {', '.join(wrong) or 'nothing else'}")
        if self.weights[0]:
            raise DataError(
                f"{self.source}: its first token has weight {self.weights[0]}, and nothing to learn it from"
            )


def grouped(examples: Sequence[Example]) -> list[list[int]]:
    """The numbers of examples, those of a group together, in the order of the first of each."""
    found: dict[object, list[int]] = {}
    for number, example in enumerate(examples):
        found.setdefault(("alone", number) if example.group is None else example.group, []).append(number)
    return list(found.values())


@dataclass(frozen=True)
class Counts:
    """What became of the rows of one file. `bad_rows` and `long_dropped` are left out; `long` counts sequences."""

    rows: int = 0
    bad_rows: int = 0
    long: int = 0
    long_dropped: int = 0
    truncated: int = 0
    split: int = 0
    sequences: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0
    median: int = 0


@dataclass(frozen=True)
class DataSummary:
    """What was read and what became of it."""

    recognised: str
    train: Counts
    eval: Counts
    held_out: bool
    duplicates_across: int

    def lines(self) -> list[str]:
        """A few lines for people."""
        lines = [self.recognised, _line("train", self.train)]
        if self.eval.rows:
            lines.append(_line("eval" + (" (held out by seed)" if self.held_out else ""), self.eval))
        if self.duplicates_across:
            number = f"{self.duplicates_across:,} of {self.eval.sequences:,}"
            lines.append(f"warning: {number} eval sequences are in train too, so validation is that much too kind")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(frozen=True)
class Data:
    """Examples to learn from and to validate on; the conversations are the same rows before the template."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    train_conversations: tuple[Conversation, ...]
    eval_conversations: tuple[Conversation, ...]
    template: ChatTemplate
    summary: DataSummary

    def longest(self, virtual: int = 0) -> int:
        """Tokens of the longest sequence, or of the longest group that stays together; `virtual` tokens stand before
        every sequence."""
        rows = (*self.train, *self.eval)
        return max(sum(len(rows[number].tokens) + virtual for number in own) for own in grouped(rows))


@dataclass(frozen=True)
class _Rows:
    """The rows of all sources on their way, and those that were bad."""

    conversations: list[Conversation]
    rows: int
    bad: tuple[BadRow, ...] = ()


def load_data(
    config: DataConfig, tokenizer: object, context_length: int, seed: int, log: Callable[[str], None]
) -> Data:
    """Everything that a recipe's `data` names, read, encoded, cut to length, split and counted.

    `log` gets the lines of the summary. Raises DataError for whatever the recipe does not allow; nothing is left
    out in silence.
    """
    template = ChatTemplate(tokenizer, config.chat_template, config.fold_system)
    max_length = min(config.max_length, context_length)
    config = with_held_out(config)
    for line in memory_notes(config):
        log(line)
    parts = read_parts(config, config.train, config.max_rows)
    train_rows = _together(parts, config)
    held = read_parts(config, config.eval) if config.eval is not None else []
    for line in dict.fromkeys(note for part in (*parts, *held) for note in part.notes):
        log(line)
    if config.eval is not None:
        eval_rows = _together(held, config)
    else:
        train_rows, eval_rows = _hold_out(train_rows, config.eval_fraction, seed)
    train, train_counts, train_kept = _examples(train_rows, config, template, max_length)
    evaluation, eval_counts, kept = _examples(eval_rows, config, template, max_length)
    if not train:
        raise DataError(f"{told(config.train)}: no row is left to train on ({_line('train', train_counts)})")
    if config.eval is not None and not evaluation:
        raise DataError(f"{told(config.eval)}: no row is left to validate on ({_line('eval', eval_counts)})")
    across = _duplicates(train, evaluation)
    sentence = "; ".join(dict.fromkeys(part.format.sentence for part in parts))
    summary = DataSummary(sentence, train_counts, eval_counts, config.eval is None, across)
    for line in summary.lines():
        log(line)
    return Data(tuple(train), tuple(evaluation), tuple(train_kept), tuple(kept), template, summary)


def _together(parts: Sequence[Part], config: DataConfig) -> _Rows:
    """The rows of all sources. Raises DataError for bad ones unless the recipe drops them."""
    bad = tuple(row for part in parts for row in part.bad)
    count = sum(len(part.rows) for part in parts)
    refuse_bad(bad, count, config)
    return _Rows([row for part in parts for row in part.conversations], count, bad)


def _hold_out(part: _Rows, fraction: float, seed: int) -> tuple[_Rows, _Rows]:
    """The rows in their order, less a share drawn by seed; at least one is held out and one is kept."""
    count = len(part.conversations)
    held = min(max(1, round(count * fraction)), count - 1) if fraction > 0 else 0
    chosen = set(np.random.default_rng(seed).permutation(count)[:held].tolist()) if held > 0 else set()
    kept = [conversation for index, conversation in enumerate(part.conversations) if index not in chosen]
    out = [conversation for index, conversation in enumerate(part.conversations) if index in chosen]
    return _Rows(kept, part.rows - len(out), part.bad), _Rows(out, len(out))


def _examples(
    part: _Rows, config: DataConfig, template: ChatTemplate, max_length: int
) -> tuple[list[Example], Counts, list[Conversation]]:
    """The examples, what was counted on the way, and the conversations of which an example is left."""
    encoded, bad = template.encode_all(part.conversations, config.train_on)
    sources = [conversation.source for conversation in part.conversations]
    named = {row.source for row in bad}
    bad += [
        BadRow(source, "nothing to learn: it is a single token")
        for source, sequences in zip(sources, encoded)
        if source not in named and not any(any(sequence.weights) for sequence in sequences)
    ]
    refuse_bad(bad, part.rows, config)
    unusable = {row.source for row in bad}
    usable = [(source, item) for source, items in zip(sources, encoded) if source not in unusable for item in items]
    fitted, counts = _fit(usable, config, max_length)
    examples = [_example(source, item) for source, item in fitted]
    left = {example.source for example in examples}
    kept = [row for row in part.conversations if row.kind == "chat" and row.source in left]
    return examples, _counted(replace(counts, rows=part.rows, bad_rows=len(part.bad) + len(bad)), examples), kept


def _fit(
    items: Sequence[tuple[str, Encoded]], config: DataConfig, max_length: int
) -> tuple[list[tuple[str, Encoded]], Counts]:
    """Sequences of at most `max_length` tokens, by the recipe's way with longer ones."""
    long = [(source, item) for source, item in items if len(item.tokens) > max_length]
    if long and config.too_long == "refuse":
        raise DataError(_too_long(long, len(items), config, max_length))
    fitted: list[tuple[str, Encoded]] = []
    truncated = split = 0
    for source, item in items:
        if len(item.tokens) <= max_length:
            fitted.append((source, item))
        elif config.too_long == "split":
            fitted += [(source, piece) for piece in _pieces(item, max_length)]
            split += 1
        elif config.too_long == "truncate":
            start = Encoded(item.tokens[:max_length], item.weights[:max_length])
            if any(start.weights):
                fitted.append((source, start))
                truncated += 1
    dropped = len(long) - truncated - split
    return fitted, Counts(long=len(long), long_dropped=dropped, truncated=truncated, split=split)


def _pieces(item: Encoded, max_length: int) -> list[Encoded]:
    """Pieces that overlap by one token, from which the next piece's first is learned: every token is learned once."""
    starts = range(0, len(item.tokens) - 1, max_length - 1)
    return [
        Encoded(item.tokens[start : start + max_length], [0.0, *item.weights[start + 1 : start + max_length]])
        for start in starts
    ]


def _too_long(long: Sequence[tuple[str, Encoded]], count: int, config: DataConfig, max_length: int) -> str:
    source, longest = max(long, key=lambda pair: len(pair[1].tokens))
    bound = "data.max_length" if max_length == config.max_length else "the model's context, below data.max_length,"
    raise_it = f"set data.max_length: {len(longest.tokens)} or more, or " if max_length == config.max_length else "set "
    return (
        f"{len(long):,} of {count:,} sequences are longer than {max_length:,} tokens ({bound} is {max_length:,}); the "
        f"longest has {len(longest.tokens):,} ({source}). {raise_it[0].upper()}{raise_it[1:]}data.too_long: truncate "
        "(their ends are not learned), drop, or split (plain text only)"
    )


def _example(source: str, item: Encoded) -> Example:
    return Example(np.asarray(item.tokens, dtype=np.int32), np.asarray(item.weights, dtype=np.float32), source)


def _counted(counts: Counts, examples: Sequence[Example]) -> Counts:
    lengths = [len(example.tokens) for example in examples]
    return replace(
        counts,
        sequences=len(examples),
        tokens=sum(lengths),
        learned_tokens=sum(int(np.count_nonzero(example.weights)) for example in examples),
        longest=max(lengths, default=0),
        median=int(np.median(lengths)) if lengths else 0,
    )


def _duplicates(train: Sequence[Example], evaluation: Sequence[Example]) -> int:
    """How many eval sequences stand, token for token, in train."""
    seen = {example.tokens.tobytes() for example in train}
    return sum(example.tokens.tobytes() in seen for example in evaluation)


def _line(name: str, counts: Counts) -> str:
    lost = [
        (counts.bad_rows, "bad rows dropped"),
        (counts.long_dropped, "too long and dropped"),
        (counts.truncated, "truncated"),
        (counts.split, "split"),
    ]
    notes = "".join(f", {number:,} {what}" for number, what in lost if number)
    sizes = (
        f"{counts.tokens:,} tokens, {counts.learned_tokens:,} learned; median {counts.median}, longest {counts.longest}"
    )
    return f"{name}: {counts.rows:,} rows -> {counts.sequences:,} sequences{notes}; {sizes}"
