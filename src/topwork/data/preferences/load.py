"""A recipe's data for objectives that compare, judge or reward answers: read, encoded, held out, counted, reported."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from topwork.common.errors import DataError, did_you_mean
from topwork.data.chat.template import ChatTemplate
from topwork.data.config import DataConfig, SourceConfig, Sources, told
from topwork.data.conversations import BadRow, Conversation, Message, RowProblem
from topwork.data.examples import Example, grouped
from topwork.data.files.rows import Row, read_rows
from topwork.data.files.sources import with_held_out
from topwork.data.meaning.mapping import value_of
from topwork.data.meaning.values import is_blank
from topwork.data.preferences import reading
from topwork.data.preferences.examples import encode_judged, encode_pairs, prompt_ids
from topwork.data.preferences.reading import Judged, Pair, Prompt, Unit
from topwork.data.preferences.shapes import Kind
from topwork.data.splitting import hold_out, repeats, times
from topwork.data.summary import Note, Tally, dropped_notes, file_notes, refuse_bad

_UNITS: dict[Kind, str] = {"preference": "pairs", "kto": "answers", "prompts": "prompts"}


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
    """A unit that can be used, what it is for an objective, and the tokens by which it is told from others.

    group   what it shares with others that must not be held out apart from it
    source  the number of its source
    """

    unit: Unit
    examples: tuple[Example, ...]
    tokens: tuple[bytes, ...]
    longest: int
    notes: tuple[str, ...] = ()
    group: str = ""
    source: int = 0


@dataclass
class _Side:
    """What the sources of `data.train` or of `data.eval` hold: units, with the group and the source of each."""

    kind: Kind = "preference"
    sources: list[SourceConfig] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    units: list[tuple[Unit, str, int]] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    count: int = 0
    notes: list[Note] = field(default_factory=list)


def load_preferences(
    config: DataConfig, tokenizer: object, context_length: int, seed: int, log: Callable[[str], None],
    kind: Kind | None = None,
) -> PreferenceData:  # fmt: skip
    """Everything that a recipe's `data` names, for an objective that needs rows of this kind.

    Where `kto` is wanted and the rows are pairs, both answers of each are judged ones. `log` gets the lines. Raises
    DataError for whatever the recipe does not allow; nothing is left out in silence.
    """
    _check(config)
    config = with_held_out(config)
    template = ChatTemplate.from_config(tokenizer, config)
    side = _read(config, config.train, config.max_rows, kind)
    entries, notes = _entries(side, config, template, context_length)
    entries, copies = _without_copies(entries, config)
    if config.eval is None:
        train, evaluation, more = _held_out(entries, config, seed)
    else:
        other = _read(config, config.eval, None, side.kind)
        train, (evaluation, more) = entries, _entries(other, config, template, context_length)
    notes += [*copies, *more]
    if not train:
        raise DataError(f"{told(config.train)}: no row is left to train on; {'; '.join(note.line() for note in notes)}")
    train = _weighted(train, side.sources, seed)
    raw = [template.reading] if template.reading else []
    lines = [*side.sentences, *raw, _line("train", train, side.kind)]
    if evaluation:
        lines.append(_line("eval" if config.eval is not None else "eval (held out by seed)", evaluation, side.kind))
    lines += [note.line() for note in notes]
    for line in lines:
        log(line)
    units = [tuple(entry.unit for entry in entries) for entries in (train, evaluation)]
    return PreferenceData(
        side.kind, _examples(train), _examples(evaluation), units[0], units[1], template, tuple(lines)
    )


def _check(config: DataConfig) -> None:
    if config.too_long not in ("refuse", "drop", "truncate"):
        raise DataError(
            f"data.too_long is {config.too_long}, which is for answers that stand alone; for pairs, judged answers and "
            "prompts set refuse, drop or truncate"
        )
    if config.streaming:
        raise DataError("data.streaming is for objective sft; leave it out for pairs, judged answers and prompts")


# Rows


def _read(config: DataConfig, named: Sources, max_rows: int | None, kind: Kind | None) -> _Side:
    """All sources together. Raises DataError where they hold different kinds."""
    side = _Side()
    kinds: dict[Kind, None] = {}
    left = max_rows
    for source in config.sources(named):
        if left == 0:
            break
        found = read_rows(source, config.documents, source.at_most(left))
        left = None if left is None else left - len(found.rows)
        kinds[_take(side, config, source, found.rows, kind)] = None
        side.notes += file_notes(found.notes)
    if len(kinds) > 1:
        raise DataError(f"{told(named)}: the sources hold {' and '.join(sorted(kinds))} rows; one run learns one kind")
    return replace(side, kind=next(iter(kinds)))


def _take(side: _Side, config: DataConfig, source: SourceConfig, rows: Sequence[Row], kind: Kind | None) -> Kind:
    """One source's units, added to the others'; their kind."""
    own = config.of_source(source)
    try:
        _check_column(rows, config)
        format = reading.recognise_preferences(rows, own, kind)
    except DataError as error:
        raise DataError(f"{source.path}: {error}") from error
    units, bad = reading.read_preferences(rows, format, own)
    sentence = format.sentence if isinstance(config.train, str) else f"{source.path}: {format.sentence}"
    if kind == "kto" and format.kind == "preference":
        units = [*reading.unpaired([unit for unit in units if isinstance(unit, Pair)])]
        sentence += "; each pair is a good and a bad answer"
    by_source = {row.source: row.fields for row in rows}
    number = len(side.sources)
    side.units += [(unit, _group(unit, by_source[unit.source], config.hold_out_by), number) for unit in units]
    side.sources.append(source)
    side.sentences.append(sentence)
    side.bad += bad
    side.count += len(rows)
    return kind or format.kind


def _group(unit: Unit, fields: Mapping[str, Any], by: str) -> str:
    """What it shares with others that must not be held out apart from it."""
    if by == "row":
        return unit.source
    if by == "prompt":
        messages = unit.messages if isinstance(unit, Prompt) else unit.prompt
        return repr([(message.role, message.content) for message in messages])
    value = _value(fields, by)
    return unit.source if is_blank(value) else repr(value)


def _value(fields: Mapping[str, Any], spec: str) -> Any:
    try:
        return value_of(fields, spec)
    except RowProblem:
        return None


def _check_column(rows: Sequence[Row], config: DataConfig) -> None:
    """Raises DataError where no row has a value in the column that rows are to be held out by."""
    by, held_out = config.hold_out_by, config.eval is None and config.eval_fraction > 0
    if not held_out or by in ("prompt", "row") or any(not is_blank(_value(row.fields, by)) for row in rows):
        return
    names = list(dict.fromkeys(name for row in rows for name in row.fields))
    raise DataError(
        f"data.hold_out_by is {by!r}, and no row has a value there{did_you_mean(by, names)}; expected prompt, row, or "
        f"a column: {', '.join(names)}"
    )


# What they become


def _entries(
    side: _Side, config: DataConfig, template: ChatTemplate, context_length: int
) -> tuple[list[_Entry], list[Note]]:
    """The units that can be used, and what is to be told of them and of the others."""
    encoded = _encoded(side, template)
    bad = [*side.bad, *(one for one in encoded if isinstance(one, BadRow))]
    refuse_bad(bad, side.count, config)
    entries = [
        replace(one, group=group, source=source)
        for one, (_, group, source) in zip(encoded, side.units)
        if isinstance(one, _Entry)
    ]
    tally = Tally()
    for entry in entries:
        tally.add((*entry.unit.notes, *entry.notes), entry.unit.source)
    fitted, fates = _fit(entries, config, min(config.max_length, context_length))
    return fitted, [*side.notes, *dropped_notes(bad), *tally.notes(), *fates]


def _encoded(side: _Side, template: ChatTemplate) -> list[_Entry | BadRow]:
    units = [unit for unit, _, _ in side.units]
    if side.kind == "prompts":
        prompts = [unit for unit in units if isinstance(unit, Prompt)]
        template.survey([Conversation((*unit.messages, Message("assistant", ".")), unit.tools, "") for unit in prompts])
        return [_asked(template, unit) for unit in prompts]
    if side.kind == "preference":
        found = encode_pairs(template, [unit for unit in units if isinstance(unit, Pair)])
    else:
        found = encode_judged(template, [unit for unit in units if isinstance(unit, Judged)])
    return [
        one if isinstance(one, BadRow) else _entry(unit, one.examples, one.notes) for unit, one in zip(units, found)
    ]


def _asked(template: ChatTemplate, unit: Prompt) -> _Entry | BadRow:
    try:
        ids = prompt_ids(template, unit)
    except DataError as error:
        return BadRow(unit.source, str(error))
    return _Entry(unit, (), (np.asarray(ids).tobytes(), repr(unit.columns).encode()), len(ids))


def _entry(unit: Unit, examples: tuple[Example, ...], notes: tuple[str, ...] = ()) -> _Entry:
    label = bytes([unit.label]) if isinstance(unit, Judged) else b""
    tokens = (label, *(example.tokens.tobytes() for example in examples))
    return _Entry(unit, examples, tokens, max(len(example.tokens) for example in examples), notes)


def _fit(entries: Sequence[_Entry], config: DataConfig, most: int) -> tuple[list[_Entry], list[Note]]:
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
    kept: list[_Entry] = []
    dropped, truncated = Tally(), Tally()
    for entry in entries:
        fits = entry if entry.longest <= most else _cut(entry, most) if config.too_long == "truncate" else None
        kept += [fits] if fits is not None else []
        if fits is not entry:
            what = f"longer than {most:,} tokens" + ("" if fits is None else ", and its end is cut off")
            (dropped if fits is None else truncated).add([what], entry.unit.source)
    return kept, [*dropped.notes(dropped=True), *truncated.notes()]


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
    return replace(_entry(entry.unit, examples), group=entry.group, source=entry.source)


def _without_copies(entries: list[_Entry], config: DataConfig) -> tuple[list[_Entry], list[Note]]:
    """Entries that are an earlier one again, told, or left out where the recipe says so."""
    copies = repeats([entry.tokens for entry in entries])
    tally, drop, again = Tally(), config.duplicates == "drop", set(copies)
    text = "the same, token for token, as an earlier one"
    for at in copies:
        tally.add([text + ("" if drop else "; data.duplicates: drop keeps the first alone")], entries[at].unit.source)
    left = [entry for at, entry in enumerate(entries) if not drop or at not in again]
    return left, tally.notes(dropped=drop, warning=not drop)


def _held_out(entries: list[_Entry], config: DataConfig, seed: int) -> tuple[list[_Entry], list[_Entry], list[Note]]:
    """The entries in their order, less a share drawn by seed, and that share."""
    groups = [entry.group for entry in entries]
    held = hold_out(groups, [True] * len(entries), config.eval_fraction, seed, config.hold_out_by)
    kept = [entry for at, entry in enumerate(entries) if at not in held.rows]
    return kept, [entry for at, entry in enumerate(entries) if at in held.rows], [*held.notes]


def _weighted(entries: Sequence[_Entry], sources: Sequence[SourceConfig], seed: int) -> list[_Entry]:
    """Each as often as an epoch sees it by its source's weight; a pair that comes again is a pair of its own."""
    often = [1] * len(entries)
    for number, source in enumerate(sources):
        own = [at for at, entry in enumerate(entries) if entry.source == number]
        if source.weight != 1.0:
            for at, count in zip(own, times(len(own), source.weight, seed, number).tolist()):
                often[at] = count
    return [
        entry if not turn else replace(entry, examples=tuple(_again(example, turn) for example in entry.examples))
        for turn in range(max(often, default=0))
        for entry, count in zip(entries, often)
        if count > turn
    ]


def _again(example: Example, turn: int) -> Example:
    return example if example.group is None else replace(example, group=f"{example.group} again {turn}")


def _examples(entries: Sequence[_Entry]) -> tuple[Example, ...]:
    return tuple(example for entry in entries for example in entry.examples)


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
