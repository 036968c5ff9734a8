"""Which format rows are in and which column is which field, by names and by what the columns hold."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from topwork.common.errors import DataError, did_you_mean
from topwork.common.yaml_text import in_yaml
from topwork.data.config import DataConfig
from topwork.data.conversations import CONTENT_KEYS, OURS, ROLE_KEYS, ROLES, Spelling, first_of
from topwork.data.meaning.columns import Columns, Shape, speaks
from topwork.data.meaning.content_parts import exchange_keys
from topwork.data.meaning.fields import FIELDS, KNOWN_AS, NEEDED, STANDARD, TOGETHER, called, first_called, plain
from topwork.data.meaning.mapping import columns_of, likenesses
from topwork.data.meaning.marks import MESSAGE_KEYS
from topwork.data.meaning.values import parsed


@dataclass(frozen=True)
class Found:
    """A format's name, its fields as field: column, and the rows that are in it.

    rivals  other columns that could be the answer as well
    """

    name: str
    columns: dict[str, str]
    shapes: tuple[Shape, ...] = ()
    names: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Rows that are in it."""
        return sum(shape.count for shape in self.shapes)


def check_options(survey: Columns, config: DataConfig) -> None:
    """Raises DataError for fields, columns, roles and keys that are none."""
    fields = sorted({field for names in FIELDS.values() for field in names})
    for field, spec in config.columns.items():
        if field not in fields:
            raise DataError(
                f"data.columns names the field {field!r}{did_you_mean(field, fields)}; expected {', '.join(fields)}. "
                "It maps a field of the format to a column of the file"
            )
        _check_columns(f"data.columns maps {field} to the column", spec, survey)
    for ours, known, option in (
        *((ours, ROLES, "roles") for ours in config.roles.values()),
        *((ours, MESSAGE_KEYS, "message_keys") for ours in config.message_keys.values()),
    ):
        if ours not in known:
            raise DataError(
                f"data.{option} maps to {ours!r}{did_you_mean(ours, known)}; it says theirs: ours, and ours are "
                f"{', '.join(dict.fromkeys(ROLES.values())) if known is ROLES else ', '.join(known)}"
            )
    held_out = config.eval is None and config.eval_fraction > 0
    if held_out and config.hold_out_by not in ("prompt", "row"):
        _check_columns("data.hold_out_by is the column", config.hold_out_by, survey)


def _check_columns(said: str, spec: str, survey: Columns) -> None:
    for column in columns_of(spec, survey.by_name):
        if column not in survey.by_name:
            raise DataError(
                f"{said} {column!r}, which the data does not have{did_you_mean(column, map(str, survey.names))}; "
                f"its columns are {survey.listed()}"
            )
    alike = likenesses(spec, survey.names)
    if alike:
        raise DataError(f"{said} {spec!r}, which may be {' or '.join(map(repr, alike))}; write it as the file does")


def refuse_twins(several: Sequence[Found], survey: Columns, mapped: Mapping[str, str]) -> None:
    """Raises DataError where a field's column was found by its name, and a row has another that differs from it in
    capital letters and white space alone: neither is the likelier one, unless it is written as the field is."""
    for found, field, column in ((each, *item) for each in several for item in each.columns.items()):
        if field in mapped or column == plain(column):
            continue
        beside = {name for key in survey.shapes if column in key for name in key}
        alike = [name for name in survey.names if name in beside and plain(name) == plain(column)]
        if len(alike) > 1:
            ways = [mapping(replace(found, columns={**found.columns, field: name}), mapped) for name in alike]
            raise DataError(
                f"the columns {' and '.join(map(repr, alike))} have one name but for capital letters and white space, "
                f"and either may be the {field}; say which: {' or '.join(ways)}"
            )


def found_in(survey: Columns, config: DataConfig) -> list[Found]:
    """The format of the rows, and those of rows that have none of its columns but all of another's; the first is
    of most use for what is in neither. Empty where no format is known."""
    filled = [name for name in survey.names if survey.filled(name)]
    first = _first(survey, config, filled) or _first(survey, config, survey.names)
    if first is None:
        return []
    asked = {field for group in NEEDED[first.name] for field in group} & set(config.columns)
    if config.format != "auto" or asked:
        return [_with_shapes(first, list(survey.shapes.items()), survey)]
    left = dict(survey.shapes)
    own = {key: left.pop(key) for key in list(left) if _touches(first, key, survey) or not key}
    others: list[Found] = []
    while left:
        other = next((other for key in left if (other := _first(survey, config, key))), None)
        if other is None:
            break
        claimed = {key: left.pop(key) for key in list(left) if _covers(other, key, survey)}
        if not claimed:
            break
        others.append(_with_shapes(other, list(claimed.items()), survey))
    return [_with_shapes(first, [*own.items(), *left.items()], survey), *others]


def needed_columns(found: Found, known: Mapping[str, object]) -> list[list[str]]:
    """For each thing without which the format cannot be read, the columns that hold it."""
    return [
        [column for field in group if field in found.columns for column in columns_of(found.columns[field], known)]
        for group in NEEDED[found.name]
    ]


def _touches(found: Found, names: Collection[str], survey: Columns) -> bool:
    return any(name in names for group in needed_columns(found, survey.by_name) for name in group)


def _covers(found: Found, names: Collection[str], survey: Columns) -> bool:
    return all(any(name in names for name in group) for group in needed_columns(found, survey.by_name))


def _with_shapes(found: Found, items: Sequence[tuple[tuple[str, ...], Shape]], survey: Columns) -> Found:
    """With the format's other fields, as far as its rows have them."""
    names = tuple(dict.fromkeys(name for key, _ in items for name in key))
    columns = dict(found.columns)
    own = {name: name for field in columns.values() for name in columns_of(field, survey.by_name)}
    for field in FIELDS[found.name]:
        if field in columns:
            continue
        column = _column(field, [name for name in names or survey.names if name not in own])
        if column is None and not survey.filled(field) and field in survey.by_name and field not in own:
            column = field  # empty in all rows, so nothing is lost either way
        if column is not None and _fits(field, column, survey):
            columns[field] = column
            own[column] = column
    return Found(found.name, columns, tuple(shape for _, shape in items), names, found.rivals)


def _fits(field: str, column: str, survey: Columns) -> bool:
    """Whether an optional field may be read there without having been asked: what is no text must not become one."""
    facts = survey.by_name[column]
    if field == "system" and facts.kinds.keys() <= {"object", "text"}:  # Google's is a message of its own
        values = (row.fields.get(column) for row in survey.sample)
        return all(first_of(value, CONTENT_KEYS) is not None for value in values if isinstance(value, Mapping))
    return field not in ("input", "system", "reasoning") or facts.is_plain or not facts.filled


def _column(field: str, names: Collection[str]) -> str | None:
    """The column that is called as a field is; one that is written exactly so before others."""
    return first_called(KNOWN_AS[field], names)


def _first(survey: Columns, config: DataConfig, names: Collection[str]) -> Found | None:
    return next(
        (
            found
            for found in _candidates(survey, config, names)
            if config.format in ("auto", found.name) and set(config.columns) <= set(FIELDS[found.name])
        ),
        None,
    )


def _candidates(survey: Columns, config: DataConfig, names: Collection[str]) -> Iterator[Found]:
    """Formats whose needed fields the names, or the recipe, give; the surest first."""
    mapped = config.columns
    yield from _talks(survey, config, names)
    for name, question, answer in (("alpaca", "instruction", "output"), ("prompt_completion", "prompt", "completion")):
        asked = mapped.get(question) or _column(question, [n for n in names if n not in mapped.values()])
        yield from _questions(survey, mapped, names, name, asked, question, answer)
    text = mapped.get("text") or _column("text", names)
    if text is not None:
        yield Found("text", {**mapped, "text": text})
    if config.format == "auto" and not mapped:
        telling = [name for name in names if _holds_talks(name, survey, _spelling(config))]
        if len(telling) == 1:
            yield Found("messages", {"messages": telling[0]})


def _talks(survey: Columns, config: DataConfig, names: Collection[str]) -> Iterator[Found]:
    mapped = config.columns
    for name, field in (("messages", "messages"), ("sharegpt", "conversations")):
        if field in mapped:
            yield Found(name, dict(mapped))
        elif config.format == name:
            column = _column(field, names)
            if column is not None:
                yield Found(name, {**mapped, field: column})
    if config.format != "auto":
        return
    for known in KNOWN_AS["messages"]:
        column = first_called((known,), [name for name in names if name not in mapped.values()])
        keys = keys_in(column, survey, _spelling(config)) if column is not None else None
        if column is not None and keys is not None:
            sharegpt = keys == ("from", "value")
            own = {"conversations" if sharegpt else "messages": column}
            yield Found("sharegpt" if sharegpt else "messages", {**mapped, **own})


def _questions(
    survey: Columns, mapped: Mapping[str, str], names: Collection[str], name: str, asked: str | None, question: str,
    answer: str,
) -> Iterator[Found]:  # fmt: skip
    used = {*mapped.values(), asked}
    free = [column for column in names if column not in used]
    if asked is not None:
        if answer in mapped or "tool_calls" in mapped:
            yield Found(name, {**mapped, question: asked})
            return
        standard = STANDARD.get(plain(asked))
        rivals = _answers(answer, free, survey)
        if rivals:
            sure = [column for column in rivals if plain(column) == standard]
            chosen = sure[0] if sure else rivals[0]
            others = () if sure else tuple(rivals[1:])
            yield Found(name, {**mapped, question: asked, answer: chosen}, rivals=others)
            return
        calls = _column("tool_calls", free)
        if calls is not None:
            yield Found(name, {**mapped, question: asked, "tool_calls": calls})
    if name == "prompt_completion":
        for pair in TOGETHER:
            first, second = (first_called((one,), names) for one in pair)
            if first is not None and second is not None:
                yield Found(name, {question: first, answer: second, **mapped})


def _answers(answer: str, free: Sequence[str], survey: Columns) -> list[str]:
    """The columns that are called as answers are, the likeliest first; those with no value in any row last."""
    known = [name for known in KNOWN_AS[answer] for name in called(known, free)]
    filled = [name for name in known if survey.filled(name)]
    return filled or known[:1]


def keys_in(column: str, survey: Columns, spelling: Spelling = OURS) -> tuple[str, str] | None:
    """The keys of the messages in a column: who speaks and what is said, or what is asked and what is answered; None
    where it holds none."""
    values = [row.fields.get(column) for row in survey.sample]
    own = next((keys for value in values if (keys := speaks(value, spelling))), None)
    return own or next((keys for value in values if (keys := _exchanged(value))), None)


def _exchanged(value: object) -> tuple[str, str] | None:
    items = parsed(value)
    return exchange_keys(parsed(items[0])) if isinstance(items, list) and items else None


def _spelling(config: DataConfig) -> Spelling:
    return Spelling(config.roles, config.message_keys)


def _holds_talks(column: str, survey: Columns, spelling: Spelling) -> bool:
    """Whether every value seen is a list of messages of known roles, and the assistant speaks."""
    facts = survey.by_name[column]
    if not facts.kinds or not all(
        kind in ("opens", "list", "parts", "texts") or kind[:8] == "messages" for kind in facts.kinds
    ):
        return False
    roles: set[str | None] = set()
    for row in survey.sample:
        value = row.fields.get(column)
        if value is None:
            continue
        if speaks(value, spelling) is None:
            return False
        for given in parsed(value):
            message = parsed(given)
            item = spelling.renamed(message) if isinstance(message, Mapping) else {}
            key = first_of(item, ROLE_KEYS)
            roles.add(spelling.role(item[key]) if key else None)
    return None not in roles and "assistant" in roles


def mapping(found: Found, mapped: Mapping[str, str]) -> str:
    """What a recipe says to read the needed fields so, and those that it names already (`mapped`), as one may paste it
    in the place of what it says now."""
    needed = [field for group in NEEDED[found.name] for field in group if field in found.columns]
    named = dict.fromkeys([*needed, *(field for field in mapped if field in found.columns)])
    return "data.columns: " + in_yaml({field: found.columns[field] for field in named})
