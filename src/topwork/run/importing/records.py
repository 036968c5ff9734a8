"""What the importing of other tools' configs is told in: a value that they give, a record for each key of theirs, and
what becomes of it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from topwork.run.importing.draft import Draft

Fate = Literal["mapped", "needless", "no equal", "unknown", "not read"]
FATES: tuple[Fate, ...] = ("mapped", "needless", "no equal", "unknown", "not read")


@dataclass(frozen=True)
class Given:
    """A value as their file gives it. `line` is counted from 1 (in a notebook in its `cell`, from 1, too), None for
    what a tool takes where nothing is given; `code` is the source of a value that only running it would tell."""

    key: str
    value: Any
    line: int | None = None
    code: str | None = None
    cell: int | None = None

    @property
    def place(self) -> str:
        """Where it stands, for people."""
        if self.line is None:
            return "left out, theirs"
        return f"line {self.line}" if self.cell is None else f"cell {self.cell}, line {self.line}"


@dataclass(frozen=True)
class Put:
    """Options of ours, by dotted keys; `note` says what differs, where something does."""

    values: Mapping[str, Any]
    note: str = ""


@dataclass(frozen=True)
class Needless:
    """Nothing has to be set here, and why."""

    why: str


@dataclass(frozen=True)
class Lacking:
    """It has no equal here, why, and what to do instead."""

    why: str


@dataclass(frozen=True)
class Refused:
    """What the whole config is for is not done here, so that no recipe is made of it."""

    why: str


Result = Put | Needless | Lacking | Refused
Convert = Callable[[Any, "Draft"], Result]
_NOTHING = object()


@dataclass(frozen=True)
class Key:
    """What becomes of one key of theirs.

    theirs   its dotted name; `[]` for the entries of a list, `*` at the end for all that begin so
    fate     what becomes of it where it is given, unless its value tells otherwise
    ours     where it goes, for people: dotted keys
    how      how it is converted, or why it has no place here and what to do instead
    convert  None where the tool's `gather` reads it together with others
    default  what the tool takes where it is left out, and ours differs; `needed` says when that counts
    """

    theirs: str
    fate: Fate
    ours: str = ""
    how: str = ""
    convert: Convert | None = None
    default: Any = field(default=_NOTHING)
    needed: Callable[["Draft"], bool] | None = None

    @property
    def has_default(self) -> bool:
        return self.default is not _NOTHING


def to(theirs: str, ours: str, convert: Convert | None = None, how: str = "", **rest: Any) -> Key:
    """A key that is an option here, by another name or the same; without `convert` with the same meaning."""
    return Key(theirs, "mapped", ours, how, convert or same(ours), **rest)


def together(theirs: str, ours: str, how: str = "") -> Key:
    """A key that is read with others, by the tool's `gather`."""
    return Key(theirs, "mapped", ours, how)


def needless(names: str, why: str) -> list[Key]:
    """Keys, between white space, for which nothing has to be set here."""
    return [Key(name, "needless", how=why) for name in names.split()]


def lacking(names: str, why: str) -> list[Key]:
    """Keys, between white space, that have no equal here. What switches something off is needless."""
    return [Key(name, "no equal", how=why, convert=unless_off(why)) for name in names.split()]


def refused(names: str, why: str) -> list[Key]:
    """Keys, between white space, that make the config one for something else."""

    def convert(value: Any, _: "Draft") -> Result:
        return Needless("off, as here") if is_off(value) else Refused(why)

    return [Key(name, "no equal", how=why, convert=convert) for name in names.split()]


def same(ours: str) -> Convert:
    """The value as it is."""
    return lambda value, _: Put({ours: value})


def unless_off(why: str) -> Convert:
    return lambda value, _: Needless("off, as here") if is_off(value) else Lacking(why)


def is_off(value: Any) -> bool:
    """Whether a value switches off what its key names."""
    return value is None or value is False or value in (0, "", [], {}, "none", "None", "no", "off", "false")


@dataclass(frozen=True)
class Tool:
    """A tool whose configs are read.

    keys    a record for each key
    signs   keys that it alone has, by which its files are recognised
    gather  reads what several keys say together, the data for one
    stem    a name's beginning that means nothing (`SFTConfig.` of an argument that the command line has by itself)
    """

    name: str
    keys: tuple[Key, ...]
    signs: frozenset[str]
    gather: Callable[["Draft"], None]
    source: str = ""
    """The package and version that its keys and defaults were read in."""

    @cached_property
    def _records(self) -> dict[str, Key]:
        return {record.theirs: record for record in reversed(self.keys)}

    @cached_property
    def _groups(self) -> list[Key]:
        return [record for record in self.keys if record.theirs.endswith("*")]

    @cached_property
    def _sections(self) -> set[str]:
        """Keys with records for what stands inside of them."""
        names = (record.theirs for record in self.keys)
        return {name[: dot.start()] for name in names for dot in re.finditer(r"\.|\[\]", name)}

    def record(self, key: str) -> Key | None:
        """That of a key as a file gives it, `datasets[2].path`."""
        plain = unnumbered(key)
        known = self._records.get(plain)
        return known or next((each for each in self._groups if plain.startswith(each.theirs[:-1])), None)

    def has_inside(self, key: str) -> bool:
        """Whether there are records for what stands inside of this key."""
        return unnumbered(key) in self._sections


def unnumbered(key: str) -> str:
    """`datasets[].path` of `datasets[2].path`, as records name it."""
    return re.sub(r"\[\d+\]", "[]", key)
