"""The formats of rows: which one a file is in, and what its rows say.

A new format is a function that turns one row into messages, a line in `FORMATS`, its fields in `fields.py`, and how it
is recognised in `recognition.py`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from topwork.common.errors import DataError
from topwork.data.config import DataConfig
from topwork.data.conversations import (
    CONTENT_KEYS,
    ROLE_KEYS,
    BadRow,
    Conversation,
    Message,
    Spelling,
    first_of,
    read_calls,
    read_messages,
    read_tools,
)
from topwork.data.files.rows import Row
from topwork.data.meaning.advice import refuse_lost_answers, refuse_unread_material, unrecognised
from topwork.data.meaning.columns import Columns, speaks
from topwork.data.meaning.fields import FIELDS, NEEDED
from topwork.data.meaning.mapping import columns_of, under_own_names, value_of
from topwork.data.meaning.recognition import Found, check_options, found_in, keys_in, refuse_twins
from topwork.data.meaning.transcripts import refuse_lone_messages
from topwork.data.meaning.usable import hashed, prompt_group, usable
from topwork.data.meaning.values import RowProblem, is_blank, opens, parsed, text_of, written
from topwork.data.preferences.refusals import no_answers, refuse_preferences
from topwork.data.preferences.talks import as_talk


@dataclass(frozen=True)
class Format:
    """How rows are read: a name of `FORMATS`, field -> column (or path, or template), and a sentence for the user.

    others  the formats of rows that have none of this one's columns and all of theirs
    """

    name: str
    columns: dict[str, str]
    sentence: str
    others: tuple["Format", ...] = ()

    def of(self, fields: Mapping[str, Any]) -> "Format":
        """The format of one row."""
        if not self.others or any(self._has(fields)):
            return self
        return next((other for other in self.others if all(other._has(fields))), self)

    def _has(self, fields: Mapping[str, Any]) -> list[bool]:
        """Whether each thing without which it cannot be read is there."""
        return [
            any(
                not is_blank(fields.get(column))
                for name in group
                if name in self.columns
                for column in columns_of(self.columns[name], fields)
            )
            for group in NEEDED[self.name]
        ]


# What a row says


@dataclass
class _Reading:
    """One row, and where its fields are; `mapped` is what data.columns says of that."""

    row: Mapping[str, Any]
    columns: Mapping[str, str]
    spelling: Spelling
    mapped: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    def value(self, name: str) -> Any:
        """A field's value; None where the format or the row has none."""
        return value_of(self.row, self.columns[name]) if name in self.columns else None

    def text(self, name: str) -> str:
        """A field's text; empty where the format or the row has none."""
        value = self.value(name)
        return "" if is_blank(value) else text_of(value, self.columns[name], name, self.mapped)

    def said(self, name: str) -> str:
        """A field's text, which may stand in a message of its own; empty where there is none."""
        value = self.value(name)
        key = first_of(value, CONTENT_KEYS) if isinstance(value, Mapping) else None
        whole = key is None or is_blank(value[key])
        return self.text(name) if whole else text_of(value[key], self.columns[name], name, self.mapped)

    def needed(self, name: str, missing: str) -> str:
        """A text without which the row cannot be used."""
        text = self.text(name)
        if not text.strip():
            column = self.columns.get(name, name)
            raise RowProblem(f"{missing}: {column} is {'empty' if column in self.row else 'missing'}")
        return text

    def messages(self, value: object, name: str) -> tuple[Message, ...]:
        """A list of messages."""
        return read_messages(value, name, self.spelling)


def _with_system(row: _Reading, messages: Sequence[Message]) -> tuple[Message, ...]:
    system = row.said("system")
    if not system.strip() or (messages[0].role == "system" and messages[0].content == system):
        return tuple(messages)
    if messages[0].role == "system" and messages[0].content.strip():
        row.notes.append(
            f"column {row.columns['system']!r} is not read: the messages have a system message of their own"
        )
        return tuple(messages)
    return (Message("system", system), *messages)


def _messages(row: _Reading) -> tuple[Message, ...]:
    return _with_system(row, row.messages(row.value("messages"), row.columns["messages"]))


def _sharegpt(row: _Reading) -> tuple[Message, ...]:
    return _with_system(row, row.messages(row.value("conversations"), row.columns["conversations"]))


def _alpaca(row: _Reading) -> tuple[Message, ...]:
    """instruction and input, an empty line between them, are the user's; history is a list of [user, assistant]."""
    asked = Message("user", _asked(row, "instruction"))
    return _with_system(row, [*_history(row), asked, _answer(row, "output")])


_SIDES = ("prompt", "completion")


def _prompt_completion(row: _Reading) -> tuple[Message, ...]:
    """Two texts, or two lists of messages."""
    prompt, completion = (_talk(row.value(name), row.columns.get(name, name), row.spelling) for name in _SIDES)
    if prompt is None:
        before: Sequence[Message] = [*_history(row), Message("user", _asked(row, "prompt"))]
    else:
        before = row.messages(prompt, row.columns["prompt"])
        if row.text("input").strip() and row.columns["input"] != row.columns["prompt"]:
            row.notes.append(f"column {row.columns['input']!r} is not read: the prompt is a list of messages")
    after = [_answer(row, "completion")] if completion is None else row.messages(completion, row.columns["completion"])
    return _with_system(row, [*before, *after])


def _asked(row: _Reading, name: str) -> str:
    """The question, and below it what it is about."""
    task = row.text(name)
    material = "" if row.columns.get("input") == row.columns[name] else row.text("input")
    if not task.strip() and not material.strip():
        where = row.columns[name] + (f" and {row.columns['input']}" if "input" in row.columns else "")
        raise RowProblem(f"no question: {where} {'are' if ' and ' in where else 'is'} empty")
    return f"{task}\n\n{material}" if task.strip() and material.strip() else task if task.strip() else material


def _answer(row: _Reading, name: str) -> Message:
    """The answer with its calls and, where it does not stand in the text already, its thinking."""
    calls, thinking = parsed(row.value("tool_calls")), row.text("reasoning")
    extra: dict[str, Any] = {} if is_blank(calls) else {"tool_calls": read_calls(calls, row.columns["tool_calls"])}
    text = row.text(name) if extra else row.needed(name, "no answer")
    if thinking.strip() and thinking.strip() not in text:
        extra["reasoning_content"] = thinking
    return Message("assistant", text, None, extra)


def _history(row: _Reading) -> list[Message]:
    """Earlier turns: messages, or pairs of what the user and the assistant said."""
    value = parsed(row.value("history"))
    if is_blank(value):
        return []
    if speaks(value):
        return list(row.messages(value, row.columns["history"]))
    if not isinstance(value, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        raise RowProblem("history is not a list of [user, assistant] pairs")
    roles = ("user", "assistant")
    return [Message(role, text_of(text, "a turn of history")) for turn in value for role, text in zip(roles, turn)]


def _talk(value: object, name: str, spelling: Spelling) -> list[Any] | None:
    """A list of messages, a message alone, OpenAI's {messages: …}, or such as text; None for all else."""
    if isinstance(value, str) and not opens(value):
        return None
    given = parsed(value)
    if isinstance(given, Mapping):
        key = first_of(given, ROLE_KEYS)
        given = as_talk(given, name) if "messages" in given or (key and spelling.role(given[key])) else None
    return given if speaks(given, spelling) else None


FORMATS: dict[str, tuple[Callable[[_Reading], tuple[Message, ...]] | None, tuple[str, ...]]] = {
    # name: (row -> messages; None for plain text, its fields)
    "messages": (_messages, FIELDS["messages"]),
    "sharegpt": (_sharegpt, FIELDS["sharegpt"]),
    "alpaca": (_alpaca, FIELDS["alpaca"]),
    "prompt_completion": (_prompt_completion, FIELDS["prompt_completion"]),
    "text": (None, FIELDS["text"]),
}


def read_conversations(
    rows: Iterable[Row], format: Format, config: DataConfig
) -> tuple[list[Conversation], list[BadRow]]:
    """The rows as conversations, and the unusable ones."""
    good: list[Conversation] = []
    bad: list[BadRow] = []
    spelling = Spelling(config.roles, config.message_keys)
    for row in rows:
        try:
            good.append(_conversation(row, format.of(row.fields), config, spelling))
        except RowProblem as problem:
            bad.append(BadRow(row.source, str(problem)))
        except RecursionError:
            bad.append(BadRow(row.source, "it is nested too deep"))
    return good, bad


def _conversation(row: Row, format: Format, config: DataConfig, spelling: Spelling) -> Conversation:
    convert = FORMATS[format.name][0]
    reading = _Reading(row.fields, format.columns, spelling, config.columns)
    if convert is None:
        text = reading.needed("text", "no text")
        return Conversation((), None, row.source, "text", text, _group(row, config, lambda: hashed(text)))
    tools = read_tools(reading.value("tools")) if "tools" in format.columns else None
    messages, notes = usable(convert(reading), config)
    group = _group(row, config, lambda: prompt_group(messages, tools))
    return Conversation(messages, tools, row.source, group=group, notes=(*reading.notes, *notes))


def _group(row: Row, config: DataConfig, prompt: Callable[[], str]) -> str | None:
    """What the row shares with others that it must not be held out apart from."""
    if config.hold_out_by == "row":
        return None
    if config.hold_out_by == "prompt":
        return prompt()
    value = value_of(row.fields, config.hold_out_by)
    return None if is_blank(value) else hashed(written(value, config.hold_out_by))


# Which format it is


def recognise(rows: Sequence[Row], config: DataConfig) -> Format:
    """The format that the recipe names or that the rows show, with its columns.

    Raises DataError for preference data, for columns that do not exist, and for rows of no known format.
    """
    return recognise_from(Columns.survey(rows), config)


def recognise_from(survey: Columns, config: DataConfig) -> Format:
    """As `recognise`, from what all rows have, for rows that are not at hand."""
    sample = [row.fields for row in survey.sample]
    config = config.model_copy(update={"columns": under_own_names(config.columns, survey.by_name)})
    refuse_preferences(config, sample, survey.names)
    check_options(survey, config)
    found = found_in(survey, config)
    if not found or found[0].name == "text":
        refuse_lone_messages(survey, config)

    def works(options: Mapping[str, Any]) -> bool:
        return _works(survey, config.model_copy(update=dict(options)))

    if not found:
        prompts = no_answers(survey.names) if config.format == "auto" else None
        raise DataError(prompts or unrecognised(survey, config, works))
    refuse_twins(found, survey, config.columns)
    format = _format(found, survey, config)
    refuse_lost_answers(found[0], survey, config, works)
    seen, _ = read_conversations(survey.sample, format, config)
    for each in found:
        refuse_unread_material(each, survey, config, works, seen)
    return format


def _works(survey: Columns, config: DataConfig) -> bool:
    """Whether the rows seen can be read so, most of them."""
    try:
        check_options(survey, config)
        found = found_in(survey, config)
        good = read_conversations(survey.sample, _format(found, survey, config), config)[0] if found else []
    except DataError:
        return False
    return 2 * len(good) > len(survey.sample)


def _format(found: Sequence[Found], survey: Columns, config: DataConfig) -> Format:
    used = {name for each in found for spec in each.columns.values() for name in columns_of(spec, survey.by_name)}
    unread = [_told(name, survey) for name in survey.names if name not in used and survey.filled(name)]
    rest = f"; not read: {', '.join(unread[:6])}{', …' if len(unread) > 6 else ''}" if unread else ""
    told = [f"{_sentence(each, survey, config)}, {_rows(each, survey, len(found) > 1)}" for each in found]
    others = tuple(Format(each.name, each.columns, f"read as {one}") for each, one in zip(found[1:], told[1:]))
    return Format(found[0].name, found[0].columns, f"read as {'; others as '.join(told)}{rest}", others)


def _rows(found: Found, survey: Columns, several: bool) -> str:
    count = found.count if several else survey.count
    first = f" from {found.shapes[0].first.source} on" if several else ""
    return f"{count:,} row{'s' if count != 1 else ''}{first}"


_LEARNED = {"answers": "every assistant turn", "last_answer": "the last assistant turn", "all": "every token"}


def _told(name: str, survey: Columns) -> str:
    share = survey.share(name) if name in survey.by_name else ""
    return f"{name} ({share})" if share else name


def _sentence(found: Found, survey: Columns, config: DataConfig) -> str:
    """`alpaca: instruction (+ input, in 8 of 60 rows) -> output, with system`."""
    columns = found.columns
    question, answer = next(
        (pair for pair in (("instruction", "output"), ("prompt", "completion")) if pair[0] in columns), ("", "")
    )
    if question:
        material = columns.get("input", columns[question])
        share = survey.share(material) if material in survey.by_name else ""
        beside = f" (+ {material}{', ' + share if share else ''})" if material != columns[question] else ""
        how = f"{columns[question]}{beside} -> {columns.get(answer, columns.get('tool_calls'))}"
        kinds = survey.by_name[columns[answer]].kinds if columns.get(answer) in survey.by_name else {}
        how += " (objects as JSON)" if {"object", "list"} & set(kinds) else ""
    else:
        column = next(iter(columns[field] for group in NEEDED[found.name] for field in group))
        keys = keys_in(column, survey) or (("from", "value") if found.name == "sharegpt" else ("role", "content"))
        spelled = "" if keys == ("role", "content") else f" ({', '.join(keys)})"
        how = f"{column}{spelled} -> {_LEARNED[config.train_on]}"
        if found.name == "text":
            how = f"{'every token' if config.response_part is None else 'marked parts'} of {column}"
        how += " (which are messages, as JSON text)" if found.name == "text" and keys_in(column, survey) else ""
    also = [field for field in ("system", "history", "tools", "tool_calls", "reasoning") if field in columns]
    more = [_told(columns[field], survey) for field in also]
    return f"{found.name}: {how}{', with ' + ', '.join(more) if more else ''}".replace("\n", "\\n")
