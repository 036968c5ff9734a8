"""What to say of rows that are not read as they stand. Each mapping that is told was tried on the same rows before."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from topwork.common.errors import DataError, did_you_mean
from topwork.common.yaml_text import in_yaml, quoted
from topwork.data.config import DataConfig
from topwork.data.conversations import Conversation, Spelling, suggested_keys, suggested_roles
from topwork.data.meaning.columns import Columns, speaks
from topwork.data.meaning.fields import (
    FIELDS,
    KNOWN_AS,
    LABELS,
    NEEDED,
    explains,
    is_about,
    is_material,
    plain,
    sounds_like,
)
from topwork.data.meaning.mapping import columns_of
from topwork.data.meaning.recognition import Found, mapping
from topwork.data.meaning.transcripts import rendered_talks
from topwork.data.meaning.values import RowProblem, is_blank, parsed, text_of

Options = Mapping[str, Any]
Works = Callable[[Options], bool]
"""Whether most of the rows seen can be read with these options in the place of the recipe's."""

_MOST = 0.8  # of the rows seen, where something is said of all
_FEW = 4  # texts that may be one question
_NO_TEXT = {"number", "bool"}  # kinds of values that are no text
_LISTED = 10  # elements of a list that a suggestion may name


def refuse_lost_answers(found: Found, survey: Columns, config: DataConfig, works: Works) -> None:
    """Raises DataError where the answer could be one of several columns, or stands beside a text that is read alone."""
    if found.rivals and config.format in ("auto", found.name):
        field = "output" if found.name == "alpaca" else "completion"
        ways = [{**found.columns, field: name} for name in (found.columns[field], *found.rivals)]
        told = [
            mapping(Found(found.name, way), config.columns) for way in ways if works({"columns": _needed(found, way)})
        ]
        named = ", ".join(columns for way in ways for columns in [way[field]])
        raise DataError(f"the answer could be any of the columns {named}. Say which is learned: {' or '.join(told)}")
    if found.name == "text" and config.format == "auto":
        _refuse_ignored_label(found, survey, works)


def _needed(found: Found, columns: Mapping[str, str]) -> dict[str, str]:
    fields = {field for group in NEEDED[found.name] for field in group}
    return {field: column for field, column in columns.items() if field in fields}


def _refuse_ignored_label(found: Found, survey: Columns, works: Works) -> None:
    text = found.columns["text"]
    label = next((name for name in found.names if plain(name) in LABELS and name != text), None)
    if label is None:
        return
    way = {"prompt": text, "completion": label}
    learn = f"Set data.columns: {in_yaml(way)} to learn the answer {label}, or " if works({"columns": way}) else "Set "
    raise DataError(
        f"the data has the columns {survey.listed()}, and reading {text} alone would leave {label} unlearned. "
        f"{learn}data.format: text to learn the text alone"
    )


# Material of the question that nothing would read

_SEEN = ("image", "images", "video", "videos", "audio", "audios")


def _refuse_pictures(found: Found, survey: Columns, config: DataConfig) -> None:
    """Raises DataError for pictures and sound beside the text, unless the recipe says which columns are read: an answer
    must not be learned without what it speaks of."""
    used = {name for spec in found.columns.values() for name in columns_of(spec, survey.by_name)}
    name = next((n for n in found.names if plain(n) in _SEEN and n not in used and survey.filled(n)), None)
    if name is None or config.columns or survey.by_name[name].kinds.keys() <= {"number", "bool"}:
        return
    raise DataError(
        f"the column {name} holds what the questions are about ({survey.by_name[name].first}), and only text is "
        f"learned here; leave those rows out, or, to learn the text alone, set {mapping(found, config.columns)}"
    )


def refuse_unread_material(
    found: Found, survey: Columns, config: DataConfig, works: Works, rows: Sequence[Conversation]
) -> None:
    """Raises DataError where a column that looks like a part of the question would stay unread, unless the recipe names
    both the question and the answer: an answer must not be learned without what it is taken from.

    rows  the rows seen, as they are read now
    """
    _refuse_pictures(found, survey, config)
    asked = all(any(field in config.columns for field in group) for group in NEEDED[found.name])
    if found.name not in ("alpaca", "prompt_completion") or asked:
        return
    used = {name for spec in found.columns.values() for name in columns_of(spec, survey.by_name)}
    unread = [name for name in found.names if name not in used and _is_part(name, survey, rows)]
    if not unread:
        return
    named = {field: found.columns[field] for field in config.columns if field in found.columns and field != "input"}
    ways = ({**way, **named} for way in _with_material(found, unread, survey))
    told = next((way for way in ways if works({"columns": way})), None)
    read = f"To read {'it' if len(unread) == 1 else 'them'}, set data.columns: {in_yaml(told)}; to" if told else "To"
    raise DataError(
        f"{', '.join(unread)} look{'s' if len(unread) == 1 else ''} like a part of the question and would not be read "
        f"beside {' and '.join(found.columns[field] for field in _needed(found, found.columns))}, so answers would be "
        f"learned without what they are taken from. {read} learn them without, set {mapping(found, config.columns)}"
    )


def _is_part(name: str, survey: Columns, rows: Sequence[Conversation]) -> bool:
    facts = survey.by_name[name]
    if not facts.filled or facts.kinds.keys() <= {"number", "bool"}:
        return False
    pairs = _beside(name, survey, rows)
    within = [cell in question or question in cell for cell, question, _ in pairs]
    if pairs and sum(within) >= _MOST * len(pairs):
        return False  # a part of the question already, or the whole prompt written out
    if is_material(name):
        return True
    if explains(name) or is_about(name) or facts.words < _MOST * facts.filled:
        return False
    taken = [len(answer) > 2 and answer in cell and len(cell) > 4 * len(answer) for cell, _, answer in pairs]
    return len(taken) > 1 and sum(taken) >= _MOST * len(taken)


def _beside(name: str, survey: Columns, rows: Sequence[Conversation]) -> list[tuple[str, str, str]]:
    """(the column's text, the last question, the last answer) of the rows seen that have all three."""
    read = {row.source: row for row in rows if len(row.messages) > 1}
    found = []
    for row in survey.sample:
        value = row.fields.get(name)
        if row.source not in read or is_blank(value):
            continue
        *_, question, answer = read[row.source].messages
        try:
            found.append((text_of(value, name).strip(), question.content.strip(), answer.content.strip()))
        except RowProblem:
            continue
    return found


def _with_material(found: Found, unread: Sequence[str], survey: Columns) -> Iterable[dict[str, str]]:
    """Mappings that read it too, the simplest first."""
    base = _needed(found, found.columns)
    own = [*([found.columns["input"]] if "input" in found.columns else []), *unread]
    if len(own) == 1 and survey.by_name[own[0]].is_plain:
        yield {**base, "input": own[0]}
    places = [_places(column, survey) for column in own]
    if all(places):
        yield {**base, "input": "\n\n".join(places)}


def _places(column: str, survey: Columns) -> str:
    """A template of a column's texts; empty where it has none that can be named."""
    facts = survey.by_name.get(column)
    if facts is None or re.search(r"[{}\[\]?]", column):
        return column if facts is None else ""
    if facts.is_plain:
        return f"{{{column}}}" if facts.filled == survey.count else f"{{{column}?}}"
    values = [parsed(row.fields.get(column)) for row in survey.sample]
    paths = _lists_of_text([value for value in values if not is_blank(value)], column)
    return "\n\n".join(paths)


def _lists_of_text(values: Sequence[Any], path: str) -> list[str]:
    """Templates of the texts in lists, or in lists or texts of objects."""
    if not values:
        return []
    if all(isinstance(value, list) and all(isinstance(item, str) for item in value) for value in values):
        lengths = [len(value) for value in values]
        names = [f"{{{path}[{at}]{'' if at < min(lengths) else '?'}}}" for at in range(min(max(lengths), _LISTED))]
        return ["\n".join(names)] if max(lengths) <= _LISTED else []
    if all(isinstance(value, Mapping) for value in values):
        found = []
        for key in values[0]:
            inner = [value.get(key) for value in values]
            if all(isinstance(item, str) for item in inner):
                found.append(f"{{{path}.{key}}}")
            elif not is_about(str(key)) and plain(key) not in LABELS:
                found += _lists_of_text(inner, f"{path}.{key}")
        return found
    return []


# Columns that are none of a known format


def unrecognised(survey: Columns, config: DataConfig, works: Works) -> str:
    """What to say of them: which mapping would do, or which fields there are."""
    way = next((way for each in _ways(survey, config) for way in _beside_own(each, config) if works(way)), None)
    if config.format != "auto":
        groups = [" or ".join(group[:1]) for group in NEEDED[config.format]]
        missing = [group[0] for group in NEEDED[config.format] if not any(name in survey.by_name for name in group)]
        near = "".join(did_you_mean(field, map(str, survey.names), 1) for field in missing)
        said = f"data.format is {config.format}, which needs {' and '.join(groups)}; the columns are {survey.listed()}"
        said += near
    else:
        said = f"the data has the columns {survey.listed()}, which is none of the known formats ({', '.join(FIELDS)})"
        said += _no_talks(survey)
    if way is not None:
        told = " and ".join(f"data.{option}: {_in_yaml(value)}" for option, value in way.items() if value)
        return f"{said.removesuffix('?')}{'? ' if said.endswith('?') else '. '}Say which is which, for example {told}"
    fields = "; ".join(f"{name}: {', '.join(FIELDS[name])}" for name in FIELDS if config.format in ("auto", name))
    end = " " if said.endswith("?") else ". "
    return f"{said}{end}Say in data.columns, as field: column, which is which; the fields are, by format, {fields}"


def _beside_own(way: Options, config: DataConfig) -> Iterable[Options]:
    """Options with the columns that the recipe names already, if that can be, and without: who pastes them replaces
    those."""
    if config.columns and "columns" in way:
        yield {**way, "columns": {**config.columns, **way["columns"]}}
    yield way


def _in_yaml(value: Any) -> str:
    return in_yaml(value) if isinstance(value, Mapping) else quoted(value)


def _no_talks(survey: Columns) -> str:
    """What a column holds that is called as conversations are, and holds none."""
    kinds = {"texts": "texts", "list": "objects that do not say who speaks", "parts": "parts of text"}
    for name in survey.names:
        column = survey.by_name[name]
        found = [kinds[kind] for kind in column.kinds if kind in kinds]
        if plain(name) in KNOWN_AS["messages"] and found:
            return f"; {name} holds lists of {found[0]} ({column.first}), expected messages, each with role and content"
    return ""


def _ways(survey: Columns, config: DataConfig) -> Iterable[Options]:
    """Options that may read the rows, by what the columns hold."""
    yield from _talks(survey, config)
    names = ("instruction", "output") if config.format == "alpaca" else ("prompt", "completion")
    yield from ({"columns": {names[0]: first, names[1]: second}} for first, second in _inside(survey))
    texts = [name for name in survey.names if _is_text(name, survey)]
    asks = sounds_like(texts, True)
    answers = [name for name in sounds_like(survey.names, False) if name not in asks]
    if not answers and not asks:
        yield from rendered_talks(survey)
    texts = [name for name in texts if plain(name) not in KNOWN_AS["system"]]
    material = [name for name in survey.names if is_material(name) and name not in (*asks, *answers)]
    if not asks and not material and len(texts) < _FEW:
        material = [name for name in texts if name not in answers]
    if len(answers) == 1 and len(asks) < 2:
        yield from _pairs(asks, answers[0], material, survey, names)
    if len(texts) == 2 and not asks[1:] and set(answers) <= {texts[1]}:
        yield {"columns": dict(zip(names, texts if texts[1] not in asks else reversed(texts)))}
    others = [name for name in survey.names if not is_about(name) and survey.by_name[name].kinds.keys() - _NO_TEXT]
    if len(texts) == len(others) == 1 and config.format in ("auto", "text") and not answers:
        yield {"columns": {"text": texts[0]}}


def _pairs(
    asks: Sequence[str], answer: str, material: Sequence[str], survey: Columns, names: tuple[str, str]
) -> Iterable[Options]:
    """A question, or what it is about alone, and its answer."""
    places = [_places(name, survey) for name in material]
    if not all(places) or not (asks or material):
        return
    pair = {names[0]: asks[0] if asks else "\n\n".join(places), names[1]: _answer(answer, survey)}
    if not asks and len(material) == 1 and survey.by_name[material[0]].is_plain:
        pair[names[0]] = material[0]
    if asks and material:
        alone = len(material) == 1 and survey.by_name[material[0]].is_plain
        pair["input"] = material[0] if alone else "\n\n".join(places)
    if _are_calls(answer, survey):
        yield {"columns": {**{field: spec for field, spec in pair.items() if field != names[1]}, "tool_calls": answer}}
    yield {"columns": pair}


def _are_calls(name: str, survey: Columns) -> bool:
    """Whether the answers are tool calls, beside tools."""
    if "tools" not in survey.by_name and "functions" not in survey.by_name:
        return False
    values = [parsed(row.fields.get(name)) for row in survey.sample]
    calls = [call for value in values if isinstance(value, list) for call in value]
    return bool(calls) and all(isinstance(call, Mapping) and "name" in call for call in calls)


def _inside(survey: Columns) -> Iterable[tuple[str, str]]:
    """The two texts of the one column that is an object of two (a sentence in two languages)."""
    objects = [name for name in survey.names if survey.by_name[name].kinds.keys() == {"object"}]
    if len(objects) != 1 or any(_is_text(name, survey) for name in survey.names):
        return
    values = [value for row in survey.sample if isinstance(value := row.fields.get(objects[0]), Mapping)]
    keys = list(values[0])
    if len(keys) == 2 and all(isinstance(value.get(key), str) for value in values for key in keys):
        yield f"{objects[0]}.{keys[0]}", f"{objects[0]}.{keys[1]}"


def _is_text(name: str, survey: Columns) -> bool:
    """Whether a column holds text that differs from row to row and is more than a name of the row."""
    facts = survey.by_name[name]
    constant = len(facts.distinct) == 1 and facts.filled > 1
    return facts.is_text and not constant and not is_about(name)


def _answer(name: str, survey: Columns) -> str:
    """The column, or the first text of the lists in it."""
    if survey.by_name[name].is_plain:
        return name
    values = [parsed(row.fields.get(name)) for row in survey.sample]
    texts = _lists_of_text([value for value in values if not is_blank(value)], name)
    return texts[0].split("\n")[0].replace("?}", "}") if texts else name


def _talks(survey: Columns, config: DataConfig) -> Iterable[Options]:
    """A column of messages under a name that is not known or inside of an object, or with unknown keys or roles."""
    for path, values in _lists(survey):
        talks = [value for value in values if isinstance(value, list) and value and isinstance(value[0], Mapping)]
        if not talks or config.format not in ("auto", "messages", "sharegpt"):
            continue
        field = "conversations" if config.format == "sharegpt" else "messages"
        spelling = Spelling(config.roles, config.message_keys)
        keys = {} if speaks(talks[0], spelling) else suggested_keys(talks[0][0])
        roles = suggested_roles(talks, Spelling(config.roles, {**config.message_keys, **keys}))
        yield {
            "columns": {field: path},
            "message_keys": {**config.message_keys, **keys},
            "roles": {**config.roles, **roles},
        }


def _lists(survey: Columns) -> Iterable[tuple[str, list[Any]]]:
    """Columns, and what stands one step inside of objects, as a path and its values in the rows seen."""
    for name in survey.names:
        values = [parsed(row.fields.get(name)) for row in survey.sample]
        yield name, values
        objects = [value for value in values if isinstance(value, Mapping)]
        for key in objects[0] if objects else ():
            yield f"{name}.{key}", [parsed(value.get(key)) for value in objects]
