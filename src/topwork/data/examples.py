"""A recipe's data as examples: token ids and the weights with which they are learned, counted and reported."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from topwork.common.errors import DataError
from topwork.data.chat.template import ChatTemplate
from topwork.data.config import DataConfig, told
from topwork.data.conversations import Conversation
from topwork.data.files.sources import memory_notes, with_held_out
from topwork.data.parts import other_sentences, sentences
from topwork.data.reading import FittedRow, Read, across, held_out, read_side, without_copies
from topwork.data.splitting import times, weight_note
from topwork.data.summary import Counts, DataSummary, Note, added


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
class Data:
    """Examples to learn from and to validate on; the conversations are the same rows before the template.

    bound  of streamed rows, which nobody has counted, what no sequence is longer than. `train` then reads them when
           they are asked for, and `train_conversations` are but one for each system message, up to two
    """

    train: Sequence[Example]
    eval: tuple[Example, ...]
    train_conversations: tuple[Conversation, ...]
    eval_conversations: tuple[Conversation, ...]
    template: ChatTemplate
    summary: DataSummary
    bound: int | None = None

    def longest(self, virtual: int = 0) -> int:
        """Tokens of the longest sequence, or of the longest group that stays together; `virtual` tokens stand before
        every sequence."""
        if self.bound is not None:
            return self.bound + virtual
        rows = (*self.train, *self.eval)
        return max(sum(len(rows[number].tokens) + virtual for number in own) for own in grouped(rows))


def load_data(
    config: DataConfig, tokenizer: object, context_length: int, seed: int, log: Callable[[str], None],
    counts: bool = True,
) -> Data:  # fmt: skip
    """Everything that a recipe's `data` names, read, encoded, cut to length, split and counted.

    `log` gets the lines of the summary, with its counts or without. Raises DataError for whatever the recipe does not
    allow; nothing is left out in silence.
    """
    template = ChatTemplate.from_config(tokenizer, config)
    max_length = min(config.max_length, context_length)
    config = with_held_out(config)
    for line in memory_notes(config):
        log(line)
    if config.streaming:
        from topwork.data.streaming.examples import load_streamed  # which is made of the same examples

        return load_streamed(config, template, max_length, seed, log, counts)
    train = read_side(config, config.train, template, max_length, config.max_rows)
    notes = [Note(template.reading)] if template.reading else []
    notes += [*train.notes, *without_copies(train.rows, config)]
    if config.eval is not None:
        evaluation = read_side(config, config.eval, template, max_length)
        notes += evaluation.notes
    else:
        train, evaluation, drawn = held_out(train, config, seed)
        notes += drawn
    often, weighted = _weighted(train, seed)
    seen = [row for row, count in zip(train.rows, often) if count]
    examples = _epoch(train.rows, often)
    held = [example for row in evaluation.rows for example in _examples(row)]
    train_counts, eval_counts = _counted(train, examples), _counted(evaluation, held)
    if not examples:
        raise DataError(f"{told(config.train)}: no row is left to train on ({_why(train_counts, notes)})")
    if config.eval is not None and not held:
        raise DataError(f"{told(config.eval)}: no row is left to validate on ({eval_counts.line('eval')})")
    told_of = (*sentences(train.ways), *other_sentences(evaluation.ways, train.ways))
    both = across(seen, evaluation.rows)
    summary = DataSummary(told_of, train_counts, eval_counts, config.eval is None, *both, (*notes, *weighted))
    for line in summary.lines(counts):
        log(line)
    return Data(tuple(examples), tuple(held), _chats(seen), _chats(evaluation.rows), template, summary)


def _examples(row: FittedRow) -> list[Example]:
    return [Example(tokens, weights, row.conversation.source) for tokens, weights in row.sequences]


def _weighted(train: Read, seed: int) -> tuple[list[int], list[Note]]:
    """How often an epoch sees each row, by its source's weight."""
    often = [1 if row.sequences else 0 for row in train.rows]
    notes = []
    for number, source in enumerate(train.sources):
        if source.weight == 1.0:
            continue
        own = [at for at, row in enumerate(train.rows) if row.source == number and row.sequences]
        counts = times(len(own), source.weight, seed, number).tolist()
        for at, count in zip(own, counts):
            often[at] = count
        notes.append(weight_note(source, sum(counts), len(own)))
    return often, notes


def _epoch(rows: Sequence[FittedRow], often: Sequence[int]) -> list[Example]:
    """Each row's sequences as often as an epoch sees it, the same objects every time."""
    own = [_examples(row) for row in rows]
    turns = range(max(often, default=0))
    return [example for turn in turns for each, count in zip(own, often) if count > turn for example in each]


def _why(counts: Counts, notes: Sequence[Note]) -> str:
    """What became of the rows."""
    return "; ".join([counts.line("train"), *[note.line() for note in notes if note.rows and not note.warning][:3]])


def _counted(read: Read, examples: Sequence[Example]) -> Counts:
    counts = measured(Counts(read.count, len(read.bad)), examples)
    return added(counts, (row.fates for row in read.rows if row.fates))


def measured(counts: Counts, examples: Sequence[Example]) -> Counts:
    """The counts with what the sequences themselves tell: how many, and how long they are."""
    lengths = [len(example.tokens) for example in examples]
    return replace(
        counts,
        sequences=len(examples),
        tokens=sum(lengths),
        learned_tokens=sum(int(np.count_nonzero(example.weights)) for example in examples),
        longest=max(lengths, default=0),
        median=int(np.median(lengths)) if lengths else 0,
    )


def _chats(rows: Sequence[FittedRow]) -> tuple[Conversation, ...]:
    """The conversations of which an example is left."""
    return tuple(row.conversation for row in rows if row.sequences and row.conversation.kind == "chat")
