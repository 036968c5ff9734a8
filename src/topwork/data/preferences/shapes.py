"""Rows that compare or judge answers, or only ask: the shapes that they have, and how an answer of each is read.

A shape says how each of its answers is read in one of the formats of `formats.py`. So a chosen answer is read by the
same code in a pair and alone, and what a recipe has to say to learn it alone follows from the shape.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from topwork.common.errors import DataError
from topwork.common.yaml_text import in_yaml
from topwork.data.conversations import RowProblem
from topwork.data.meaning.fields import called, first_called, plain
from topwork.data.preferences.talks import SPEAKS, is_talk, role_of, transcript

Kind = Literal["preference", "kto", "prompts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FIELDS: dict[Kind, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected", "margin", "tools", "system"),
    "kto": ("prompt", "completion", "messages", "label", "tools", "system"),
    "prompts": ("prompt", "tools", "system"),
}
"""What `data.columns` may name."""

Fields = Mapping[str, Any]
Columns = Mapping[str, str]
TALK, ANSWER = " talk", " answer"
"""Columns that `Shape.opened` makes."""

_PAIRS = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("chosen_conversations", "rejected_conversations"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
    ("response_j", "response_k"),
)
_TALKS = ("messages", "conversations", "conversation", "dialog", "chat")
_QUESTIONS = ("prompt", "question", "instruction", "input", "query", *_TALKS)
ANSWERS = ("completion", "response", "answer", "output")
_MARGINS = (("margin",), ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))


@dataclass(frozen=True)
class Shape:
    """Where rows hold what is compared, judged or asked.

    format   a name of `FORMATS`: how a talk that ends with one of the answers is read
    answers  for each answer, the chosen one first, the columns of that format
    told     the columns by which it was recognised, for people
    alone    what a recipe says to learn the first answer as it stands
    opened   what stands in the place of a row's fields for the answer of this number, before it is read; may raise
             RowProblem
    columns  what else is read: label; margin (one column, or two of which the second is subtracted)
    """

    kind: Kind
    format: str
    answers: tuple[Columns, ...]
    told: str
    alone: str
    opened: Callable[[Fields, int], Fields] = lambda fields, number: fields  # noqa: ARG005
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def shape_of(kind: Kind, rows: Sequence[Fields], found: Sequence[str], mapped: Columns) -> Shape | None:
    """The shape of rows whose columns are `found`; `mapped` is data.columns. None where they have none of this kind.

    Raises DataError where a column was found by its name, and another differs from it in capital letters alone.
    """
    shape = _SHAPES[kind](rows, found, mapped)
    if shape is not None:
        read = {name for answer in shape.answers for name in answer.values()}
        read |= {name for names in shape.columns.values() for name in names}
        _refuse_twins(read - {*mapped.values()}, rows, found)
    return shape


def _refuse_twins(read: Collection[str], rows: Sequence[Fields], found: Sequence[str]) -> None:
    for column in read:
        alike = [name for name in found if plain(name) == plain(column) and _first(rows, name) is not None]
        if len(alike) > 1 and column in alike and column != plain(column):
            raise DataError(
                f"the columns {' and '.join(map(repr, alike))} have one name but for capital letters and white space; "
                "say in data.columns which is read"
            )


def _alone(format: str, columns: Columns) -> str:
    """What a recipe says for rows to be read so."""
    pairs = f"data.columns: {in_yaml(columns)}"
    if format == "prompt_completion":
        return pairs
    own = all(name == column for name, column in columns.items())
    return f"data.format: {format}" + ("" if own else f" and {pairs}")


def _read_as(
    kind: Kind, format: str, answers: Sequence[Columns], told: str, columns: Mapping[str, tuple[str, ...]],
    opened: Callable[[Fields, int], Fields] = Shape.opened,
) -> Shape:  # fmt: skip
    return Shape(kind, format, tuple(answers), told, _alone(format, answers[0]), opened, columns)


# Pairs


def _pair(rows: Sequence[Fields], found: Sequence[str], mapped: Columns) -> Shape | None:
    known = _known_together(_PAIRS, found) or ("", "")
    chosen, rejected = mapped.get("chosen", known[0]), mapped.get("rejected", known[1])
    if not (chosen and rejected):
        return _swift(rows, found) or _ranked(rows, found, mapped)
    told, margin = f"columns {chosen} and {rejected}", _margin(found, mapped)
    value, prompt = _first(rows, chosen), _prompt(found, mapped)
    if is_talk(value) and (prompt is None or role_of(value[0]) not in (*SPEAKS, "tool")):
        format, name = _talk_format(value)
        return _read_as("preference", format, [{name: chosen}, {name: rejected}], told, margin)
    if prompt is None:
        return _transcripts(chosen, rejected, margin) if transcript(value) else None
    if plain(prompt) == "instruction" and isinstance(value, str):
        question, format, answer = {"instruction": prompt}, "alpaca", "output"
    else:
        question, format, answer = {"prompt": prompt}, "prompt_completion", "completion"
    answers = [{**question, answer: column} for column in (chosen, rejected)]
    return _read_as("preference", format, answers, told, margin, _opens(prompt, chosen, rejected))


def _transcripts(chosen: str, rejected: str, margin: Mapping[str, tuple[str, ...]]) -> Shape:
    """Anthropic's hh: whole talks as text."""

    def opened(fields: Fields, number: int) -> Fields:
        column = (chosen, rejected)[number]
        turns = transcript(fields.get(column))
        if turns is None:
            raise RowProblem(f"{column} is no talk of Human: and Assistant:, as that of other rows is")
        return {**fields, TALK: turns}

    parts = r'data.response_part: "\n\nAssistant:" and data.instruction_part: "\n\nHuman:"'
    alone = f"data.format: text, data.columns: {in_yaml({'text': chosen})}, {parts}"
    told = f"columns {chosen} and {rejected}, talks of Human: and Assistant:"
    return Shape("preference", "messages", ({"messages": TALK},) * 2, told, alone, opened, margin)


def _swift(rows: Sequence[Fields], found: Sequence[str]) -> Shape | None:
    """ms-swift: messages that end with the chosen answer, beside the rejected one or the rejected talk."""
    talk = next((name for name in _all_known(_TALKS, found) if is_talk(_first(rows, name))), None)
    rejected = _known(("rejected_response", "rejected_messages"), found)
    if talk is None or rejected is None:
        return None
    format, name = _talk_format(_first(rows, talk))

    def opened(fields: Fields, number: int) -> Fields:
        turns = fields.get(talk)
        if number == 0 or not is_talk(turns) or not isinstance(turns[-1], Mapping):
            return fields
        if fields.get(rejected) is None:
            raise RowProblem(f"no answer: {rejected} is missing")
        last = {key: value for key, value in turns[-1].items() if key in ("role", "from")}
        return {**fields, talk: [*turns[:-1], {**last, "content": fields.get(rejected)}]}

    told, margin = f"columns {talk} and {rejected}", _margin(found, {})
    if plain(rejected) == "rejected_messages":
        return _read_as("preference", format, [{name: talk}, {name: rejected}], told, margin)
    return _read_as("preference", format, [{name: talk}] * 2, told, margin, opened)


def _ranked(rows: Sequence[Fields], found: Sequence[str], mapped: Columns) -> Shape | None:
    """Nectar: a list of answers with ranks, 1 the best. The first and the last are a pair."""
    column = _known(("answers",), found) or "answers"
    first = _first(rows, column)
    prompt = _prompt(found, mapped)
    ranked = isinstance(first, list) and first and isinstance(first[0], Mapping) and {"answer", "rank"} <= set(first[0])
    if not ranked or prompt is None:
        return None

    def opened(fields: Fields, number: int) -> Fields:
        ranks = _ranks(fields, column)
        if len(ranks) < 2:
            raise RowProblem(f"{column} has fewer than two ranks that are numbers, so none is better than another")
        return {**_opens(prompt)(fields, number), ANSWER: ranks[(min, max)[number](ranks)]}

    answers = ({"prompt": prompt, "completion": ANSWER},) * 2
    in_order = all(min(ranks) == next(iter(ranks)) for fields in rows if (ranks := _ranks(fields, column)))
    best = {"prompt": prompt, "completion": f"{column}[0].answer" if in_order else "COLUMN"}
    alone = f"data.columns: {in_yaml(best)}" + ("" if in_order else ", after writing the best answers into a COLUMN")
    return Shape("preference", "prompt_completion", answers, f"column {column}, with ranks", alone, opened)


def _ranks(fields: Fields, column: str) -> dict[float, Any]:
    """The answers of a row by their ranks, in its order; none where a rank is no number."""
    given = fields.get(column)
    items = [item for item in given if isinstance(item, Mapping)] if isinstance(given, list) else []
    return {item["rank"]: item.get("answer") for item in items if isinstance(item.get("rank"), int | float)}


# Judged answers, and prompts


def _judged(rows: Sequence[Fields], found: Sequence[str], mapped: Columns) -> Shape | None:
    label = mapped.get("label") or _known(("kto_tag", "label"), found)
    if label is None or ("label" not in mapped and not _judges(rows, label)):
        return None
    columns = {"label": (label,)}
    completion = mapped.get("completion") or _known(("completion",), found)
    talks = [mapped["messages"]] if "messages" in mapped else [*_all_known(_TALKS, found), *filter(None, [completion])]
    talk = next((name for name in talks if is_talk(_first(rows, name))), None)
    prompt, answer = _prompt(found, mapped), mapped.get("completion") or _known(ANSWERS, found)
    if talk is not None and (talk != answer or role_of(_first(rows, talk)[0]) not in SPEAKS):
        format, name = _talk_format(_first(rows, talk))
        return _read_as("kto", format, [{name: talk}], f"true/false column {label} beside {talk}", columns)
    if prompt is None or answer is None or prompt == answer:
        return None
    told = f"true/false column {label} beside {answer}"
    if plain(prompt) == "instruction" and isinstance(_first(rows, answer), str):
        return _read_as("kto", "alpaca", [{"instruction": prompt, "output": answer}], told, columns)
    return _read_as(
        "kto", "prompt_completion", [{"prompt": prompt, "completion": answer}], told, columns, _opens(prompt, answer)
    )


def _asked(rows: Sequence[Fields], found: Sequence[str], mapped: Columns) -> Shape | None:  # noqa: ARG001
    prompt = _prompt(found, mapped)
    if prompt is None:
        return None
    own = _opens(prompt)
    answers = ({"prompt": prompt, "completion": ANSWER},)
    alone = f"data.columns: {in_yaml({'prompt': prompt, 'completion': 'COLUMN'})}, where a column holds the answers"

    def opened(fields: Fields, number: int) -> Fields:
        return {**own(fields, number), ANSWER: "."}

    return Shape("prompts", "prompt_completion", answers, f"column {prompt}", alone, opened)


# What values are


def judgement(value: object) -> bool | None:
    """What a label says of an answer; None where it says neither good nor bad."""
    text = str(value).strip().lower()
    return True if text in _GOOD else False if text in _BAD else None


_GOOD = {"true", "1", "1.0", "+1", "yes", "good", "up", "thumbs_up", "thumbs up", "desirable", "👍"}
_BAD = {"false", "0", "0.0", "-1", "-1.0", "no", "bad", "down", "thumbs_down", "thumbs down", "undesirable", "👎"}


def _judges(rows: Sequence[Fields], label: str) -> bool:
    """Whether nine in ten of its values are judgements."""
    given = [value for fields in rows if (value := fields.get(label)) is not None]
    return bool(given) and sum(judgement(value) is not None for value in given) >= 0.9 * len(given)


def _opens(prompt: str, *answers: str) -> Callable[[Fields, int], Fields]:
    """A prompt that is a talk as text, up to the answer that is wanted, becomes its turns, and the answers lose the
    space behind `Assistant:`. OpenAI's tools, which stand beside its messages, become a column."""

    def opened(fields: Fields, number: int) -> Fields:  # noqa: ARG001
        value = fields.get(prompt)
        if isinstance(value, Mapping) and value.get("tools"):
            return {"tools": value["tools"], **fields, prompt: value.get("messages")}
        turns = transcript(value) or [{}]
        wants = turns[-1].get("role") == "assistant" and not turns[-1]["content"]
        if not wants or len(turns) == 1:
            return fields
        texts = {name: text.strip() for name in answers if isinstance(text := fields.get(name), str)}
        return {**fields, **texts, prompt: turns[:-1]}

    return opened


def _margin(found: Sequence[str], mapped: Columns) -> Mapping[str, tuple[str, ...]]:
    known = (mapped["margin"],) if "margin" in mapped else _known_together(_MARGINS, found)
    return {"margin": known} if known else {}


def _prompt(found: Sequence[str], mapped: Columns) -> str | None:
    return mapped.get("prompt") or _known(_QUESTIONS, found)


def _known(names: Sequence[str], found: Sequence[str]) -> str | None:
    return first_called(names, found)


def _all_known(names: Sequence[str], found: Sequence[str]) -> list[str]:
    return [column for name in names for column in called(name, found)[:1]]


def _known_together(several: Sequence[tuple[str, ...]], found: Sequence[str]) -> tuple[str, ...] | None:
    """The columns that are called as the first of these that are all there."""
    return next((tuple(own) for names in several if len(own := _all_known(names, found)) == len(names)), None)


def _first(rows: Sequence[Fields], column: str) -> Any:
    """The column's first value that is there."""
    return next((value for fields in rows if (value := fields.get(column)) is not None), None)


def _talk_format(value: list[Any]) -> tuple[str, str]:
    """The format of a list of messages, and its field."""
    return ("messages", "messages") if "role" in value[0] else ("sharegpt", "conversations")


_SHAPES = {"preference": _pair, "kto": _judged, "prompts": _asked}
