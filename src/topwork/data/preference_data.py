"""A recipe's data for objectives that compare, judge or reward answers: read, encoded, held out, counted, reported."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from topwork.common.errors import DataError, did_you_mean
from topwork.data.config import DataConfig, SourceConfig, Sources, told
from topwork.data.conversations import BadRow, Conversation, Message
from topwork.data.examples import Example, grouped
from topwork.data.formats import refuse_bad
from topwork.data.pair_shapes import Kind
from topwork.data.preference_examples import encode_judged, encode_pairs, prompt_ids
from topwork.data.preferences import Judged, Pair, Prompt, Unit, read_preferences, recognise_preferences, unpaired
from topwork.data.rows import read_rows
from topwork.data.template import ChatTemplate

_UNITS: dict[Kind, str] = {"preference": "pairs", "kto": "answers", "prompts": "prompts"}
_SHOWN = 5  # rows named in a notice


@dataclass(frozen=True)
class PreferenceData:
    """Rows to learn from and to validate on: pairs, judged answers or prompts, and the examples that they are.

    train, eval              a pair's two stand side by side, the chosen one first; none where the rows are prompts
    train_units, eval_units  the same rows before the template
    lines                    what was read and what became of it, for people
    """

    kind: Kind
    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    train_units: tuple[Unit, ...]
    eval_units: tuple[Unit, ...]
    template: ChatTemplate
    lines: tuple[str, ...]

    def longest(self, virtual: int = 0) -> int:
        """Tokens of the longest group that stays together; `virtual` tokens stand before every sequence."""
        rows = (*self.train, *self.eval)
        return max((sum(len(rows[at].tokens) + virtual for at in own) for own in grouped(rows)), default=0)


@dataclass(frozen=True)
class _Entry:
    """A unit that can be used, what it is for an objective, and its tokens by which it is told from others."""

    unit: Unit
    examples: tuple[Example, ...]
    tokens: tuple[bytes, ...]
    longest: int
    group: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Read:
    """What the sources of `data.train` or `data.eval` hold."""

    kind: Kind
    sentences: tuple[str, ...]
    units: tuple[Unit, ...]
    groups: tuple[str, ...]
    rows: int
    bad: tuple[BadRow, ...]


def load_preferences(
    config: DataConfig,
    tokenizer: object,
    context_length: int,
    seed: int,
    log: Callable[[str], None],
    kind: Kind | None = None,
) -> PreferenceData:
    """Everything that a recipe's `data` names, for an objective that needs rows of this kind.

    Where `kto` is wanted and the rows are pairs, both answers of each are judged ones. `log` gets the lines. Raises
    DataError for whatever the recipe does not allow; nothing is left out in silence.
    """
    _check(config)
    template = ChatTemplate.from_config(tokenizer, config)
    most = min(config.max_length, context_length)
    read = _read(config, config.train, config.max_rows, kind)
    train, lines = _entries(read, config, template, most)
    evaluation: list[_Entry] = []
    held = ""
    if config.eval is not None:
        other = _read(config, config.eval, None, read.kind)
        evaluation, more = _entries(other, config, template, most)
        lines += [f"eval: {line}" for line in more]
    else:
        train, evaluation = _hold_out(train, config.eval_fraction, seed)
        held = " (held out by seed)"
    if not train:
        raise DataError(f"{told(config.train)}: no row is left to train on ({'; '.join(lines)})")
    raw = [template.reading] if template.reading else []
    lines = [*read.sentences, *raw, *lines, _line("train", train, read.kind)]
    lines += [_line("eval" + held, evaluation, read.kind)] if evaluation else []
    for line in lines:
        log(line)
    return PreferenceData(
        read.kind, _examples(train), _examples(evaluation), tuple(entry.unit for entry in train),
        tuple(entry.unit for entry in evaluation), template, tuple(lines),
    )  # fmt: skip


def _check(config: DataConfig) -> None:
    if config.too_long not in ("refuse", "drop", "truncate"):
        raise DataError(
            f"data.too_long is {config.too_long}, which is for answers that stand alone; for pairs, judged answers and "
            "prompts set refuse, drop or truncate"
        )
    if config.streaming:
        raise DataError("data.streaming is for objective sft; leave it out for pairs, judged answers and prompts")


# Rows


def _read(config: DataConfig, named: Sources, max_rows: int | None, kind: Kind | None) -> _Read:
    """All sources together. Raises DataError where they hold different kinds."""
    found: list[_Read] = []
    left = max_rows
    for source in config.sources(named):
        if left == 0:
            break
        if source.weight != 1.0:
            raise DataError(f"{source.path}: a weight is for objective sft; leave it out, and see max_rows")
        found.append(_source(config, source, left, kind))
        left = None if left is None else left - found[-1].rows
    kinds = sorted({one.kind for one in found})
    if len(kinds) > 1:
        raise DataError(f"{told(named)}: the sources hold {' and '.join(kinds)} rows; one run learns from one kind")
    return _Read(
        found[0].kind,
        tuple(dict.fromkeys(sentence for one in found for sentence in one.sentences)),
        tuple(unit for one in found for unit in one.units),
        tuple(group for one in found for group in one.groups),
        sum(one.rows for one in found),
        tuple(row for one in found for row in one.bad),
    )


def _source(config: DataConfig, source: SourceConfig, left: int | None, kind: Kind | None) -> _Read:
    limits = [limit for limit in (source.max_rows, left) if limit is not None]
    rows = read_rows(source, config.documents, min(limits, default=None)).rows
    own = config.of_source(source)
    try:
        format = recognise_preferences(rows, own, kind)
    except DataError as error:
        raise DataError(f"{source.path}: {error}") from error
    units, bad = read_preferences(rows, format, own)
    sentence = format.sentence
    if kind == "kto" and format.kind == "preference":
        pairs = [unit for unit in units if isinstance(unit, Pair)]
        units, sentence = [*unpaired(pairs)], f"{sentence}; each pair is a good and a bad answer"
    by_source = {row.source: row.fields for row in rows}
    groups = [_group(unit, by_source[unit.source], config.hold_out_by) for unit in units]
    return _Read(kind or format.kind, (sentence,), tuple(units), tuple(groups), len(rows), tuple(bad))


def _group(unit: Unit, fields: Mapping[str, Any], by: str) -> str:
    """What it shares with others that must not be held out apart from it."""
    if by == "row":
        return unit.source
    if by == "prompt":
        messages = unit.messages if isinstance(unit, Prompt) else unit.prompt
        return repr([(message.role, message.content) for message in messages])
    if by not in fields:
        raise DataError(
            f"data.hold_out_by is {by!r}, which {unit.source} does not have{did_you_mean(by, fields)}; expected "
            f"prompt, row, or a column: {', '.join(fields)}"
        )
    return repr(fields[by])


def _hold_out(entries: Sequence[_Entry], fraction: float, seed: int) -> tuple[list[_Entry], list[_Entry]]:
    """The entries in their order, less groups drawn by seed until they are that share of the rows."""
    wanted = max(1, round(len(entries) * fraction)) if fraction > 0 else 0
    names = list(dict.fromkeys(entry.group for entry in entries))
    sizes = Counter(entry.group for entry in entries)
    out: set[str] = set()
    for at in np.random.default_rng(seed).permutation(len(names))[: len(names) - 1]:
        if sum(sizes[name] for name in out) >= wanted:
            break
        out.add(names[at])
    return [entry for entry in entries if entry.group not in out], [entry for entry in entries if entry.group in out]


# What they become


def _entries(read: _Read, config: DataConfig, template: ChatTemplate, most: int) -> tuple[list[_Entry], list[str]]:
    """The rows that can be used, and what is to be said of the others."""
    encoded = _encode(read, template)
    bad = [*read.bad, *(one for one in encoded if isinstance(one, BadRow))]
    refuse_bad(bad, read.rows, config)
    entries = [replace(one, group=group) for one, group in zip(encoded, read.groups) if isinstance(one, _Entry)]
    lines = [f"{len(bad):,} of {read.rows:,} rows cannot be used and are dropped: {_named(row.source for row in bad)}"]
    lines = lines if bad else []
    notes: dict[str, list[str]] = {}
    for entry in entries:
        for note in dict.fromkeys((*entry.unit.notes, *entry.notes)):
            notes.setdefault(note, []).append(entry.unit.source)
    lines += [f"{len(sources):,} rows: {note} ({_named(sources)})" for note, sources in notes.items()]
    fitted, more = _fit(entries, config, most)
    seen: dict[tuple[bytes, ...], _Entry] = {}
    for entry in fitted:
        seen.setdefault(entry.tokens, entry)
    again = len(fitted) - len(seen)
    if again:
        what = "dropped" if config.duplicates == "drop" else "kept; data.duplicates: drop leaves them out"
        more.append(f"{again:,} {_UNITS[read.kind]} stand there before, token for token: {what}")
    return list(seen.values()) if config.duplicates == "drop" else fitted, lines + more


def _encode(read: _Read, template: ChatTemplate) -> list[_Entry | BadRow]:
    if read.kind == "prompts":
        prompts = [unit for unit in read.units if isinstance(unit, Prompt)]
        template.survey([Conversation((*unit.messages, Message("assistant", ".")), unit.tools, "") for unit in prompts])
        return [_asked(template, unit) for unit in prompts]
    pairs = [unit for unit in read.units if isinstance(unit, Pair)]
    judged = [unit for unit in read.units if isinstance(unit, Judged)]
    encoded = encode_pairs(template, pairs) if read.kind == "preference" else encode_judged(template, judged)
    return [
        one if isinstance(one, BadRow) else _entry(unit, one.examples, one.notes)
        for unit, one in zip(read.units, encoded)
    ]  # fmt: skip


def _asked(template: ChatTemplate, unit: Prompt) -> _Entry | BadRow:
    try:
        ids = prompt_ids(template, unit)
    except DataError as error:
        return BadRow(unit.source, str(error))
    return _Entry(unit, (), (np.asarray(ids).tobytes(), repr(unit.columns).encode()), len(ids))


def _entry(unit: Unit, examples: tuple[Example, ...], notes: tuple[str, ...] = ()) -> _Entry:
    label = bytes([unit.label]) if isinstance(unit, Judged) else b""
    tokens = (label, *(example.tokens.tobytes() for example in examples))
    return _Entry(unit, examples, tokens, max(len(example.tokens) for example in examples), notes=notes)


def _fit(entries: Sequence[_Entry], config: DataConfig, most: int) -> tuple[list[_Entry], list[str]]:
    """Those of at most so many tokens, by the recipe's way with longer ones."""
    long = [entry for entry in entries if entry.longest > most]
    if not long:
        return list(entries), []
    longest = max(long, key=lambda entry: entry.longest)
    if config.too_long == "refuse":
        raise DataError(
            f"{len(long):,} of {len(entries):,} rows have a sequence longer than {most:,} tokens; the longest has "
            f"{longest.longest:,} ({longest.unit.source}). Set data.max_length: {longest.longest} (the model's context "
            "bounds it too), or data.too_long: drop, or truncate, which cuts off the ends of answers"
        )
    cut = {id(entry): _cut(entry, most) for entry in long} if config.too_long == "truncate" else {}
    kept = [cut.get(id(entry)) if entry.longest > most else entry for entry in entries]
    left = [entry for entry in kept if entry is not None]
    truncated = len(left) - (len(entries) - len(long))
    told = [(truncated, "truncated"), (len(long) - truncated, "dropped")]
    return left, [f"{number:,} longer than {most:,} tokens and {what}" for number, what in told if number]


def _cut(entry: _Entry, most: int) -> _Entry | None:
    """Without the ends beyond so many tokens; None where an answer is gone or no answer differs any more."""
    examples = tuple(
        replace(
            example, tokens=example.tokens[:most], weights=example.weights[:most],
            columns={name: column[:most] for name, column in example.columns.items()},
        )
        for example in entry.examples
    )  # fmt: skip
    tokens = {example.tokens.tobytes() for example in examples}
    if not examples or len(tokens) < len(examples) or not all(example.weights.any() for example in examples):
        return None
    return replace(_entry(entry.unit, examples), group=entry.group)


def _examples(entries: Sequence[_Entry]) -> tuple[Example, ...]:
    return tuple(example for entry in entries for example in entry.examples)


def _named(sources: Iterable[str]) -> str:
    names = list(dict.fromkeys(sources))
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _line(name: str, entries: Sequence[_Entry], kind: Kind) -> str:
    lengths = [len(example.tokens) for entry in entries for example in entry.examples] or [
        entry.longest for entry in entries
    ]
    learned = sum(int(np.count_nonzero(example.weights)) for entry in entries for example in entry.examples)
    good = sum(entry.unit.label for entry in entries if isinstance(entry.unit, Judged))
    sides = f" ({good:,} good, {len(entries) - good:,} bad)" if kind == "kto" else ""
    tokens = f"{sum(lengths):,} tokens" + (f", {learned:,} learned" if learned else "")
    sizes = f"median {int(np.median(lengths))}, longest {max(lengths)}"
    return f"{name}: {len(entries):,} {_UNITS[kind]}{sides}; {tokens}; {sizes}"
