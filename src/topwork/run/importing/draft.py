"""A recipe in the making: what a config of theirs gives, what of it has become ours, and what is told of each key."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topwork.common.errors import did_you_mean, shortened
from topwork.run.importing.records import Fate, Given, Key, Lacking, Needless, Put, Refused, Result, Tool

_VALUE = 60
_UNUSUAL = (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError)
"""What a stranger's value of another shape raises, which the tool would refuse, too."""


@dataclass
class Told:
    """What became of one key of theirs. `line` is None for what the tool takes where nothing is given."""

    given: Given
    fate: Fate
    ours: str = ""
    note: str = ""

    @property
    def value(self) -> str:
        """As it is told, shortened."""
        text = self.given.code if self.given.code is not None else _spelled(self.given.value)
        return shortened(one_line(text), _VALUE)


@dataclass
class Draft:
    """A config on its way to a recipe.

    folder   where their file lies, from which it may name others
    devices  on how many it was meant to run, which multiplies its batch
    values   our options, by dotted keys, each with the keys of theirs that it came from
    missing  what no recipe can be without and the file does not tell
    refused  why no recipe is made of it at all
    """

    tool: Tool
    given: list[Given]
    folder: Path = Path()
    devices: int = 1
    told: list[Told] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, list[Told]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """What is told of the whole, beside what is told of each key."""

    def value(self, key: str, default: Any = None) -> Any:
        """What their file gives, or the tool's default; what is left empty is not given."""
        found = next((each.value for each in self.given if each.key == key and each.value is not None), None)
        if found is not None:
            return found
        record = self.tool.record(key) if default is None else None
        return record.default if record is not None and record.has_default else default

    def has(self, key: str) -> bool:
        """Whether their file itself gives it."""
        return any(each.key == key and each.value is not None and each.line is not None for each in self.given)

    def known(self, key: str, default: Any) -> Any:
        """As `value`; raises ValueError where the file gives code that is not run."""
        code = next((each.code for each in self.given if each.key == key and each.code is not None), None)
        if code is not None and not self.has(key):
            raise ValueError(f"{key} is computed")
        return self.value(key, default)

    def put(self, ours: str, value: Any, *keys: str) -> None:
        """Sets an option of ours that comes of these keys of theirs."""
        self.values[ours] = value
        self.origins[ours] = [told for told in self.told if told.given.key in keys and told.fate == "mapped"]

    def add_default(self, given: Given, ours: str) -> None:
        """Sets an option to what the tool takes where its file says nothing."""
        told = Told(given, "mapped", ours)
        self.told.append(told)
        self.values[ours], self.origins[ours] = given.value, [told]

    def say(self, key: str, fate: Fate, note: str, ours: str = "") -> None:
        """Tells of a key what only its neighbours decide."""
        for told in self.told:
            if told.given.key == key:
                told.fate, told.note, told.ours = fate, note, ours

    def note(self, key: str, note: str) -> None:
        """Adds to what is told of a key that goes where its record says."""
        for told in self.told:
            if told.given.key == key and note not in told.note:
                told.note = f"{told.note}; {note}" if told.note else note


def translate(draft: Draft) -> Draft:
    """Goes through all keys that are given, then through the defaults that count, then through what several say
    together."""
    for each in draft.given:
        _take(draft, each, draft.tool.record(each.key))
    given = {each.key for each in draft.given if each.value is not None or each.code is not None}
    for record in draft.tool.keys:
        if record.has_default and record.theirs not in given and _counts(record, draft):
            default = Given(record.theirs, record.default)
            draft.given.append(default)
            _take(draft, default, record)
    try:
        draft.tool.gather(draft)
    except _UNUSUAL as error:
        draft.missing.append(f"data: it is not written as {draft.tool.name} takes it ({error}); set it by hand")
    _without_idle(draft)
    return draft


def _counts(record: Key, draft: Draft) -> bool:
    """Whether a default has to be written out."""
    try:
        return record.needed is None or record.needed(draft)
    except _UNUSUAL:
        return False


def _without_idle(draft: Draft) -> None:
    """Leaves out what says nothing to the method or to a base that is not quantized: theirs may stand there unread."""
    if draft.values.get("adapter.method") == "full":
        _drop(draft, "adapter.", ("method", "exclude_modules"), "all weights are trained, and no adapter is")
        _drop(draft, "training.loraplus_lr_ratio", (), "all weights are trained, and no adapter is")
    if not draft.values.get("quantization.load_in_4bit"):
        _drop(draft, "quantization.", ("load_in_8bit", "llm_int8_skip_modules"), "the base is not in 4 bits")
    if not any(draft.values.get(f"quantization.load_in_{bits}bit") for bits in (4, 8)):
        _drop(draft, "quantization.llm_int8_skip_modules", (), "the base is not quantized")


def _drop(draft: Draft, prefix: str, kept: tuple[str, ...], why: str) -> None:
    for ours in [key for key in draft.values if key.startswith(prefix) and key.removeprefix(prefix) not in kept]:
        del draft.values[ours]
        for told in draft.origins.pop(ours, []):
            told.fate, told.ours, told.note = "needless", "", why


def _take(draft: Draft, given: Given, record: Key | None) -> None:
    if record is None and given.value is None and draft.tool.has_inside(given.key):
        draft.told.append(Told(given, "needless", note="left empty, which is the tool's default"))
    elif record is None:
        near = did_you_mean(given.key, [key.theirs for key in draft.tool.keys], limit=1)
        draft.told.append(Told(given, "unknown", note=f"{draft.tool.name} has no such key that is known here{near}"))
    elif given.code is not None and record.fate == "needless":
        draft.told.append(Told(given, "needless", note=record.how))
    elif given.code is not None:
        draft.told.append(Told(given, "not read", record.ours, "computed when it runs, not read; set it by hand"))
    elif given.value is None:
        draft.told.append(Told(given, "needless", note="left empty, which is the tool's default"))
    elif record.convert is None:
        draft.told.append(Told(given, record.fate, record.ours, record.how))
    else:
        _apply(draft, given, record, _converted(record, given, draft))


def _converted(record: Key, given: Given, draft: Draft) -> Result:
    assert record.convert is not None
    try:
        return record.convert(given.value, draft)
    except _UNUSUAL as error:
        return Lacking(f"its value is not what {draft.tool.name} takes there ({error}); set it by hand")


def _apply(draft: Draft, given: Given, record: Key, result: Result) -> None:
    match result:
        case Needless(why=why):
            draft.told.append(Told(given, "needless", note=why))
        case Lacking(why=why):
            draft.told.append(Told(given, "no equal", note=why))
        case Refused(why=why):
            told = Told(given, "no equal", note=why)
            draft.told.append(told)
            where = f"{given.place}: " if given.line else ""
            draft.refused.append(f"{where}{given.key}: {told.value}: {why}")
        case Put(values=values, note=note):
            told = Told(given, "mapped", ", ".join(values), "; ".join(filter(None, (record.how, note))))
            draft.told.append(told)
            for ours, value in values.items():
                draft.origins.setdefault(ours, []).append(told)
                draft.values[ours] = value


def one_line(text: str) -> str:
    """For a comment or a message: what a stranger's file says may hold line breaks and letters that do not show."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _spelled(value: Any) -> str:
    """A value as YAML writes it."""
    match value:
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case list():
            return f"[{', '.join(map(_spelled, value))}]"
        case dict():
            return "{" + ", ".join(f"{key}: {_spelled(each)}" for key, each in value.items()) + "}"
    return str(value)
