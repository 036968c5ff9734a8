"""Rows for objectives that compare answers, judge them, or ask for them: pairs, judged answers, prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Any

from topwork.common.errors import DataError, did_you_mean
from topwork.data.config import DataConfig
from topwork.data.conversations import BadRow, Conversation, Message, RowProblem
from topwork.data.files.rows import Row
from topwork.data.meaning.fields import called, first_called
from topwork.data.meaning.formats import FORMATS, Format, read_conversations
from topwork.data.meaning.mapping import likenesses, under_own_names
from topwork.data.preferences.shapes import FIELDS, KINDS, Kind, Shape, judgement, shape_of
from topwork.data.preferences.talks import is_talk, respelled, role_of

Tools = list[dict[str, Any]] | None
_REPEATED = 16  # letters of a prompt at the head of both answers that are no chance


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it. An answer is the assistant's turns, with the tools' between them.

    margin  by how much the chosen answer is better, as the file has it; None where it does not say
    notes   as `Conversation.notes`
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: str
    tools: Tools = None
    margin: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judged:
    """A prompt and an answer to it that somebody found good (`label`) or bad."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool
    source: str
    tools: Tools = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the row's other columns as they are, for what rewards its answers."""

    messages: tuple[Message, ...]
    source: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    tools: Tools = None
    notes: tuple[str, ...] = ()


Unit = Pair | Judged | Prompt


@dataclass(frozen=True)
class PreferenceFormat:
    """How rows are read, and a sentence for the user."""

    shape: Shape
    sentence: str

    @property
    def kind(self) -> Kind:
        return self.shape.kind


def recognise_preferences(rows: Sequence[Row], config: DataConfig, kind: Kind | None = None) -> PreferenceFormat:
    """What the rows hold: what data.format names, else `kind`, else what they show: pairs, or labels, or prompts.

    Raises DataError for columns that do not exist and for rows that hold nothing of the kind.
    """
    fields = [respelled(row.fields, config) for row in rows]
    found = list(dict.fromkeys(name for row in fields for name in row))
    wanted = config.format if config.format != "auto" else kind
    if wanted is not None and wanted not in KINDS:
        raise DataError(f"data.format is {wanted}, which holds one answer a row; expected auto or {' or '.join(KINDS)}")
    if kind not in (None, wanted) and (kind, wanted) != ("kto", "preference"):
        raise DataError(f"data.format is {wanted}, and the objective needs {kind} rows; leave data.format out")
    kinds: list[Kind] = [one for one in KINDS if wanted in (None, one)]
    kinds += (
        ["preference"] if (kind, config.format) == ("kto", "auto") else []
    )  # both answers of a pair are judged ones
    _check_columns(config.columns, kinds, found)
    mapped = under_own_names(config.columns, dict.fromkeys(found))
    shapes = (shape_of(one, fields, found, mapped) for one in kinds)
    shape = next((shape for shape in shapes if shape is not None), None)
    if shape is None:
        raise DataError(_unrecognised(kinds, found))
    return PreferenceFormat(
        shape, f"read as {shape.kind}: {_sentence(shape)}, {len(rows):,} row{'s' if len(rows) != 1 else ''}"
    )


def _sentence(shape: Shape) -> str:
    columns = {name: " - ".join(columns) for name, columns in shape.columns.items()}
    return shape.told + "".join(f", {name} from {column}" for name, column in columns.items() if name == "margin")


def _check_columns(columns: Mapping[str, str], kinds: Sequence[Kind], found: Sequence[str]) -> None:
    fields = list(dict.fromkeys(name for kind in kinds for name in FIELDS[kind]))
    for name, column in columns.items():
        if name not in fields:
            raise DataError(
                f"data.columns names the field {name!r}{did_you_mean(name, fields)}; expected {', '.join(fields)}"
            )
        if not called(column, found) and "{" not in column:
            raise DataError(
                f"data.columns maps {name} to the column {column!r}, which the data does not have"
                f"{did_you_mean(column, found)}; its columns are {', '.join(found)}"
            )
        alike = likenesses(column, found)
        if alike:
            raise DataError(
                f"data.columns maps {name} to the column {column!r}, which may be {' or '.join(map(repr, alike))}; "
                "write it as the file does"
            )


def _unrecognised(kinds: Sequence[Kind], found: Sequence[str]) -> str:
    needs = {
        "preference": "prompt, chosen and rejected (or chosen and rejected that hold whole talks)",
        "kto": "messages, or prompt and completion, and a label (true or false)",
        "prompts": "prompt",
    }
    told = "; ".join(f"{kind} needs {needs[kind]}" for kind in kinds)
    fields = [name for name in FIELDS[kinds[0]][:3] if name not in found]
    example = ", ".join(f"{name}: COLUMN" for name in fields)
    return (
        f"the data has the columns {', '.join(found)}, in which no {' or '.join(kinds)} rows are known: {told}. "
        f"Name them, for example data.columns: {{{example}}}"
    )


def read_preferences(
    rows: Sequence[Row], format: PreferenceFormat, config: DataConfig
) -> tuple[list[Unit], list[BadRow]]:
    """The rows as pairs, judged answers or prompts, and the unusable ones.

    Unusable is a row without an answer or a label, and one whose two answers are the same or answer different prompts.
    """
    shape, make = format.shape, _MAKE[format.kind]
    rows = [Row(dict(respelled(row.fields, config)), row.source) for row in rows]
    config = config.model_copy(update={"message_keys": {}, "roles": {}})
    talks = [_talks(rows, shape, number, config) for number in range(len(shape.answers))]
    good: list[Unit] = []
    bad: list[BadRow] = []
    for at, row in enumerate(rows):
        read = [side[at] for side in talks]
        try:
            problem = next((one.reason for one in read if isinstance(one, BadRow)), None)
            if problem is not None:
                raise RowProblem(problem)
            good.append(make(row, shape, [one for one in read if isinstance(one, Conversation)]))
        except RowProblem as found:
            bad.append(BadRow(row.source, str(found)))
    return good, bad


def unpaired(pairs: Sequence[Pair]) -> list[Judged]:
    """Both answers of each pair, the chosen one good and the rejected one bad: for an objective that reads labels."""
    return [
        Judged(pair.prompt, answer, label, pair.source, pair.tools, pair.notes)
        for pair in pairs
        for answer, label in ((pair.chosen, True), (pair.rejected, False))
    ]


# Talks, by the formats that hold one answer a row


def _talks(rows: Sequence[Row], shape: Shape, number: int, config: DataConfig) -> list[Conversation | BadRow]:
    """Each row's talk that ends with this one of its answers, or why there is none."""
    found: list[Conversation | BadRow | None] = [None] * len(rows)
    opened: list[Row] = []
    for at, row in enumerate(rows):
        try:
            fields = shape.opened(row.fields, number)
            _check_answered(fields.get([*shape.answers[number].values()][-1]))
            opened.append(Row(dict(fields), str(at)))
        except RowProblem as problem:
            found[at] = BadRow(row.source, str(problem))
    columns = _with_own(shape, number, opened, config)
    good, bad = read_conversations(opened, Format(shape.format, columns, shape.told), config)
    given: list[Conversation | BadRow] = [*good, *bad]
    for one in given:
        found[int(one.source)] = one
    return [one for one in found if one is not None]


def _check_answered(value: object) -> None:
    """Raises RowProblem for a talk that ends without an answer: read alone it may be cut, in a pair it is no side."""
    if not is_talk(value):
        return
    last = value[-1] if isinstance(value[-1], Mapping) else {}
    if role_of(last) in ("user", "human"):
        raise RowProblem("no answer: the last turn is the user's")
    text = last.get("content", last.get("value"))
    if (not text or str(text).isspace()) and not (last.get("tool_calls") or last.get("function_call")):
        raise RowProblem("no answer: the last turn is empty")


def _with_own(shape: Shape, number: int, rows: Sequence[Row], config: DataConfig) -> dict[str, str]:
    """The columns of an answer, and the format's others that the file has under their own names or the recipe names."""
    columns = dict(shape.answers[number])
    names = dict.fromkeys(name for row in rows for name in row.fields)
    for name in FORMATS[shape.format][1]:
        column = config.columns.get(name) or first_called((name,), names)
        if name not in columns and column is not None:
            columns[name] = column
    return columns


# Units


def _pair(row: Row, shape: Shape, talks: Sequence[Conversation]) -> Pair:
    chosen, rejected = talks
    if _same(chosen.messages) == _same(rejected.messages):
        raise RowProblem("the chosen and the rejected answer are equal, so neither is better")
    given = [_given(row, shape, number) for number in (0, 1)]
    at = _prompt_length(chosen.messages, rejected.messages, given)
    answers = chosen.messages[at:], rejected.messages[at:]
    if shape.format != "messages":
        asked = chosen.messages[at - 1].content.strip()
        if len(asked) > _REPEATED and all(answer[0].content.strip().startswith(asked) for answer in answers):
            raise RowProblem("both answers begin with the whole prompt; leave it out of them")
    notes = tuple(dict.fromkeys((*chosen.notes, *rejected.notes)))
    return Pair(chosen.messages[:at], *answers, row.source, chosen.tools, _margin(row, shape), notes)


def _given(row: Row, shape: Shape, number: int) -> int | None:
    """Messages of an answer that stands apart from its prompt; None where it does not."""
    if shape.format == "alpaca":
        return 1
    if shape.format != "prompt_completion":
        return None
    value = row.fields.get(shape.answers[number]["completion"])
    return len(value) if isinstance(value, list) and is_talk(value) else 1


def _prompt_length(chosen: Sequence[Message], rejected: Sequence[Message], given: Sequence[int | None]) -> int:
    """Messages that both talks begin with, up to where the assistant begins to answer in each its own way."""
    pairs = zip(_same(chosen), _same(rejected))
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    lengths = {len(talk) - count for talk, count in zip((chosen, rejected), given) if count is not None}
    if len(lengths) == 1 and 0 < min(lengths) <= shared:
        return lengths.pop()
    starts = [
        at for at in range(1, min(shared, len(chosen) - 1, len(rejected) - 1) + 1)
        if chosen[at].role == rejected[at].role == "assistant"
    ]  # fmt: skip
    if not starts:
        raise RowProblem("the chosen and the rejected answer have different prompts, or none")
    if not all(_one_answer(talk[starts[-1] :]) for talk in (chosen, rejected)):
        raise RowProblem(
            "the chosen and the rejected talk differ before the last answer, so these are answers to different prompts"
        )
    return starts[-1]


def _one_answer(messages: Sequence[Message]) -> bool:
    """Whether nobody but tools speaks between the assistant's turns."""
    roles = [message.role for message in messages]
    return "user" not in roles and ("assistant", "assistant") not in pairwise(roles)


def _same(messages: Sequence[Message]) -> list[tuple[str, str, dict[str, Any]]]:
    """What of messages is compared: all but their weights."""
    return [(message.role, message.content, message.extra) for message in messages]


def _margin(row: Row, shape: Shape) -> float | None:
    if "margin" not in shape.columns:
        return None
    columns = shape.columns["margin"]
    try:
        found = [float(row.fields[column]) for column in columns]
    except (KeyError, TypeError, ValueError) as error:
        raise RowProblem(f"no margin: {' or '.join(columns)} is missing or no number") from error
    return found[0] - sum(found[1:])


def _judged(row: Row, shape: Shape, talks: Sequence[Conversation]) -> Judged:
    (talk,), (column,) = talks, shape.columns["label"]
    value = row.fields.get(column)
    label = judgement(value)
    if label is None:
        raise RowProblem(f"no label: {column} is {value!r}, expected true or false, 1 or 0, 👍 or 👎")
    at = len(talk.messages) - (_given(row, shape, 0) or 1)
    if at < 1:
        raise RowProblem("there is nothing that the answer answers")
    return Judged(talk.messages[:at], talk.messages[at:], label, row.source, talk.tools, talk.notes)


def _asked(row: Row, shape: Shape, talks: Sequence[Conversation]) -> Prompt:
    (talk,), prompt = talks, shape.answers[0]["prompt"]
    messages = talk.messages[:-1]
    if messages[-1].role == "assistant":
        raise RowProblem("the prompt ends with an answer; expected the user's turn at its end")
    columns = {name: value for name, value in row.fields.items() if name not in (prompt, "tools", "system")}
    return Prompt(messages, row.source, columns, talk.tools, talk.notes)


_MAKE: dict[Kind, Callable[[Row, Shape, Sequence[Conversation]], Unit]] = {
    "preference": _pair, "kto": _judged, "prompts": _asked,
}  # fmt: skip
