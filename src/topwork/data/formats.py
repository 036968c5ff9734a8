"""The formats of rows: which one a file is in, and what its rows say.

A new format is a function that turns one row into messages, a line in `FORMATS`, and a line in `_COLUMN_SETS` for how
it is recognised.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topwork.common.errors import DataError, did_you_mean
from topwork.data.config import DataConfig
from topwork.data.conversations import (
    BadRow,
    Conversation,
    Message,
    RowProblem,
    checked,
    read_messages,
    read_tools,
    text_of,
)
from topwork.data.refusals import no_answers, refuse_preferences
from topwork.data.rows import Row
from topwork.data.talks import as_talk

Columns = Mapping[str, str]
_SAMPLE = 50  # rows looked at to recognise a format
_SHOWN = 5  # bad rows named in a message


@dataclass(frozen=True)
class Format:
    """How rows are read: a name of `FORMATS`, field -> column, and a sentence for the user."""

    name: str
    columns: dict[str, str]
    sentence: str


def _text(row: Mapping[str, Any], columns: Columns, name: str) -> str:
    """The column's text; empty where the format or the row has none."""
    value = row.get(columns[name]) if name in columns else None
    return "" if value is None else text_of(value, columns[name])


def _needed(row: Mapping[str, Any], columns: Columns, name: str, missing: str) -> str:
    text = _text(row, columns, name)
    if not text.strip():
        raise RowProblem(f"{missing}: {columns[name]} is {'empty' if columns[name] in row else 'missing'}")
    return text


def _with_system(row: Mapping[str, Any], columns: Columns, messages: Sequence[Message]) -> tuple[Message, ...]:
    system = _text(row, columns, "system")
    if system.strip() and messages[0].role != "system":
        return (Message("system", system), *messages)
    return tuple(messages)


def _messages(row: Mapping[str, Any], columns: Columns) -> tuple[Message, ...]:
    column = columns["messages"]
    return _with_system(row, columns, read_messages(row.get(column), column))


def _sharegpt(row: Mapping[str, Any], columns: Columns) -> tuple[Message, ...]:
    column = columns["conversations"]
    return _with_system(row, columns, read_messages(row.get(column), column))


def _alpaca(row: Mapping[str, Any], columns: Columns) -> tuple[Message, ...]:
    """instruction and input, an empty line between them, are the user's; history is a list of [user, assistant]."""
    history = (row.get(columns["history"]) if "history" in columns else None) or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise RowProblem("history is not a list of [user, assistant] pairs")
    roles = ("user", "assistant")
    before = [Message(role, text_of(text, "history")) for turn in history for role, text in zip(roles, turn)]
    task, material = _text(row, columns, "instruction"), _text(row, columns, "input")
    prompt = f"{task}\n\n{material}" if task.strip() and material.strip() else task if task.strip() else material
    if not prompt.strip():
        raise RowProblem("no question: instruction and input are empty")
    answer = _needed(row, columns, "output", "no answer")
    return _with_system(row, columns, [*before, Message("user", prompt), Message("assistant", answer)])


def _prompt_completion(row: Mapping[str, Any], columns: Columns) -> tuple[Message, ...]:
    """Two texts, or two lists of messages."""
    prompt, completion = (as_talk(row.get(columns[name]), columns[name]) for name in ("prompt", "completion"))
    if _is_messages(prompt) or _is_messages(completion):
        before = read_messages(prompt, columns["prompt"]) if _is_messages(prompt) else None
        after = read_messages(completion, columns["completion"]) if _is_messages(completion) else None
        before = before or (Message("user", _needed(row, columns, "prompt", "no question")),)
        after = after or (Message("assistant", _needed(row, columns, "completion", "no answer")),)
        return _with_system(row, columns, before + after)
    question = _needed(row, columns, "prompt", "no question")
    answer = _needed(row, columns, "completion", "no answer")
    return _with_system(row, columns, [Message("user", question), Message("assistant", answer)])


FORMATS: dict[str, tuple[Callable[[Mapping[str, Any], Columns], tuple[Message, ...]] | None, tuple[str, ...]]] = {
    # name: (row -> messages; None for plain text, (the fields without which it cannot be read, then the others))
    "messages": (_messages, ("messages", "tools", "system")),
    "sharegpt": (_sharegpt, ("conversations", "tools", "system")),
    "alpaca": (_alpaca, ("instruction", "output", "input", "system", "history")),
    "prompt_completion": (_prompt_completion, ("prompt", "completion", "tools", "system")),
    "text": (None, ("text",)),
}
_NEEDED = {"messages": 1, "sharegpt": 1, "alpaca": 2, "prompt_completion": 2, "text": 1}
_OFTEN = {
    "messages": "messages -> every assistant turn",
    "sharegpt": "conversations (from, value) -> every assistant turn",
    "text": "every token of text",
}

# Column names by which a format is recognised, the first that fits.
_COLUMN_SETS: tuple[tuple[str, dict[str, str]], ...] = (
    *(("messages", {"messages": name}) for name in ("messages", "conversations", "conversation", "dialog", "chat")),
    *(("sharegpt", {"conversations": name}) for name in ("conversations", "conversation", "messages")),
    *(("alpaca", {"instruction": "instruction", "output": name}) for name in ("output", "response", "completion")),
    *(
        ("prompt_completion", {"prompt": prompt, "completion": completion})
        for prompt, completion in (
            ("prompt", "completion"),
            ("prompt", "response"),
            ("question", "answer"),
            ("query", "response"),
            ("input", "output"),
            ("input", "target"),
            ("source", "target"),
        )
    ),
    ("text", {"text": "text"}),
)
_LABELS = ("label", "labels", "category", "intent", "class", "target", "answer", "output", "completion", "response")


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and _key(value) != ""


def _key(value: object) -> str:
    """'role', 'from' or '': how a list of messages names who speaks."""
    first = value[0] if isinstance(value, list) and value else None
    return next((key for key in ("role", "from") if isinstance(first, Mapping) and key in first), "")


def recognise(rows: Sequence[Row], config: DataConfig) -> Format:
    """The format that the recipe names or that the first rows show, with its columns.

    Raises DataError for preference data, for columns that do not exist, and for rows of no known format.
    """
    sample = [row.fields for row in rows[:_SAMPLE]]
    found = list(dict.fromkeys(name for fields in sample for name in fields))
    refuse_preferences(config, [row.fields for row in rows], found)
    _check_columns(config.columns, found)
    for name, standard in _candidates(config):
        columns = {**standard, **config.columns}
        if set(columns) <= set(FORMATS[name][1]) and _fits(name, columns, sample, found, config.format != "auto"):
            columns |= {field: field for field in FORMATS[name][1] if field in found and field not in columns}
            if name == "text" and config.format == "auto":
                _refuse_ignored_label(columns, found)
            return Format(name, columns, _sentence(name, columns, found, len(rows)))
    raise DataError((config.format == "auto" and no_answers(found)) or _unrecognised(config, found))


def _candidates(config: DataConfig) -> list[tuple[str, dict[str, str]]]:
    named = [item for item in _COLUMN_SETS if config.format in ("auto", item[0])]
    return [(name, {k: v for k, v in columns.items() if k not in config.columns}) for name, columns in named]


def _fits(name: str, columns: Columns, sample: list[dict[str, Any]], found: list[str], named: bool) -> bool:
    needed = FORMATS[name][1][: _NEEDED[name]]
    if not all(columns.get(field) in found for field in needed):
        return False
    if named or name not in ("messages", "sharegpt"):
        return True
    keys = {_key(fields.get(columns[needed[0]])) for fields in sample}
    return ("role" if name == "messages" else "from") in keys


def _check_columns(columns: Columns, found: list[str]) -> None:
    fields = sorted({field for _, names in FORMATS.values() for field in names})
    for field, column in columns.items():
        if field not in fields:
            raise DataError(
                f"data.columns names the field {field!r}{did_you_mean(field, fields)}; expected {', '.join(fields)}. "
                "It maps a field of the format to a column of the file"
            )
        if column not in found:
            raise DataError(
                f"data.columns maps {field} to the column {column!r}, which the data does not have"
                f"{did_you_mean(column, found)}; its columns are {', '.join(map(str, found))}"
            )


def _refuse_ignored_label(columns: Columns, found: list[str]) -> None:
    label = next((name for name in found if name.lower() in _LABELS), None)
    if label is not None:
        text = columns["text"]
        raise DataError(
            f"the data has the columns {', '.join(found)}, and reading {text} alone would leave {label} unlearned. "
            f"Set data.columns: {{prompt: {text}, completion: {label}}} to learn the answer {label}, "
            "or data.format: text to learn the text alone"
        )


def _sentence(name: str, columns: Columns, found: list[str], count: int) -> str:
    if name == "alpaca":
        how = f"{columns['instruction']}{' (+ ' + columns['input'] + ')' if 'input' in columns else ''}"
        how = f"{how} -> {columns['output']}"
    elif name == "prompt_completion":
        how = f"{columns['prompt']} -> {columns['completion']}"
    else:
        how = _OFTEN[name]
    unread = [column for column in found if column not in columns.values()]
    rest = f"; not read: {', '.join(unread[:6])}{', …' if len(unread) > 6 else ''}" if unread else ""
    return f"read as {name}: {how}, {count:,} row{'s' if count != 1 else ''}{rest}"


def _unrecognised(config: DataConfig, found: list[str]) -> str:
    listed = ", ".join(map(str, found))
    if config.format != "auto":
        needed = FORMATS[config.format][1][: _NEEDED[config.format]]
        near = "".join(did_you_mean(field, found, 1) for field in needed if field not in found)
        return (
            f"data.format is {config.format}, which needs {' and '.join(needed)}; the columns are {listed}{near}. "
            f"Name them, for example data.columns: {{{', '.join(f'{field}: COLUMN' for field in needed)}}}"
        )
    example = f"{{prompt: {found[0]}, completion: {found[1]}}}" if len(found) > 1 else "{text: COLUMN}"
    return (
        f"the data has the columns {listed}, which is none of the known formats ({', '.join(FORMATS)}). "
        f"Say which column is which, for example data.columns: {example}"
    )


def read_conversations(
    rows: Sequence[Row], format: Format, config: DataConfig
) -> tuple[list[Conversation], list[BadRow]]:
    """The rows as conversations, and the unusable ones."""
    good: list[Conversation] = []
    bad: list[BadRow] = []
    for row in rows:
        try:
            good.append(_conversation(row, format, config))
        except RowProblem as problem:
            bad.append(BadRow(row.source, str(problem)))
    return good, bad


def _conversation(row: Row, format: Format, config: DataConfig) -> Conversation:
    convert = FORMATS[format.name][0]
    if convert is None:
        text = _needed(row.fields, format.columns, "text", "no text")
        return Conversation((), None, row.source, "text", text)
    tools = read_tools(row.fields.get(format.columns["tools"])) if "tools" in format.columns else None
    return Conversation(checked(convert(row.fields, format.columns), config.system), tools, row.source)


def refuse_bad(bad: Sequence[BadRow], count: int, config: DataConfig) -> None:
    """Raises DataError naming the first bad rows and their number, unless the recipe says to drop them."""
    if not bad or config.on_bad_row == "drop":
        return
    named = "\n".join(f"  {row.source}: {row.reason}" for row in bad[:_SHOWN])
    more = f"\n  … and {len(bad) - _SHOWN:,} more" if len(bad) > _SHOWN else ""
    raise DataError(
        f"{len(bad):,} of {count:,} rows cannot be used:\n{named}{more}\n"
        "Correct them, or set data.on_bad_row: drop to leave them out"
    )
