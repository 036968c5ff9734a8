"""What a registry of adapters (`registry.py`) gives out and takes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from topwork.adapters.config import AdapterConfig
from topwork.adapters.fitting import Parts
from topwork.common.errors import AdapterError, quoted

LONGEST_NAME = 256


class ChangedAdapterError(AdapterError):
    """An adapter left memory, and its folder holds something else by now."""


class NoRoomError(AdapterError):
    """As many adapters as fit are in use: try again when one has been released."""


@dataclass(frozen=True)
class Capacity:
    """How many adapters stand in the base at once, and how much memory they take (None: as many as are loaded)."""

    resident: int | None = None
    memory_bytes: int | None = None

    def holds(self, count: int, memory_bytes: int) -> bool:
        """Whether so many, of so many bytes in all, are no more than that."""
        few = self.resident is None or count <= self.resident
        return few and (self.memory_bytes is None or memory_bytes <= self.memory_bytes)


@dataclass(eq=False)
class Version:
    """One adapter as it stands in the base. It never changes but for `uses`.

    name      the public name that it came under
    adapter   what it is called in the base: given once, never again
    content   the hash of its options and tensors
    source    a label of where it is from; no path
    uses      how many requests run or wait with it
    asked     when it was last asked for, on the registry's own clock
    """

    name: str
    adapter: str
    content: str
    source: str
    memory_bytes: int
    uses: int = 0
    asked: int = field(default=0, repr=False)


@dataclass(frozen=True)
class Place:
    """Where an adapter is read from, and in which folders what it links to must lie (None: anywhere)."""

    folder: Path
    within: tuple[Path, ...] | None = None


@dataclass(frozen=True)
class Absent:
    """An adapter that is loaded but is not in memory: `prepare_again` it, `restore` that, and admit once more."""

    name: str
    content: str
    source: str
    place: Place = field(repr=False)


@dataclass(frozen=True)
class Prepared:
    """An adapter that was read, checked and built, ready to be installed. `warning` is for whoever runs this."""

    name: str
    content: str
    source: str
    place: Place = field(repr=False)
    config: AdapterConfig = field(repr=False)
    parts: Parts = field(repr=False)
    memory_bytes: int
    warning: str | None = None


@dataclass
class Entry:
    """A public name: what it stands for, since when (seconds since 1970), and where that was read.

    pinned   it does not leave memory while its name stands
    version  None while it is not in memory
    """

    name: str
    content: str
    source: str
    place: Place
    pinned: bool
    created: int
    version: Version | None


@dataclass(frozen=True)
class Change:
    """A version came into the base, or is about to leave it."""

    kind: Literal["grafted", "removed"]
    version: Version


def check_public_name(name: str, reserved: Sequence[str] = ()) -> None:
    """AdapterError for what no adapter can be asked for by."""
    if not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
        raise AdapterError(
            f"{quoted(name)} cannot be a model's name; give 1 to {LONGEST_NAME} characters that can be printed"
        )
    if name in reserved:
        raise AdapterError(f"{name!r} is the name of the base; give the adapter one of its own")
