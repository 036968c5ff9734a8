"""Which adapters may be asked for, by the names that clients send, and which of them stand in the base.

A public name points to a version, which never changes: what is put in its place is another version. A request takes
its version as it is admitted and gives it back when it ends; meanwhile the name may be pointed elsewhere or go, and the
version that it stood for drains: it leaves the base when its last request has ended. Those that nobody uses leave
memory, the one that was asked for longest ago first, when there are more than fit; they come back when they are asked
for (`admit` tells that they have to be read again).

`prepare` and `prepare_again` read, check and build, and may run on any thread while the base runs. Everything else
belongs to the thread that runs the base, between two of its steps.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from topwork.adapters.fitting import freeze, held_bytes
from topwork.adapters.foreign import read_foreign
from topwork.adapters.foreign_patterns import check_patterns
from topwork.adapters.foreign_tensors import ReadLimits
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, check_base, fitted
from topwork.common.errors import AdapterError, TopworkError, UnknownAdapterError, did_you_mean, quoted, shortened
from topwork.generation.versions import (
    LONGEST_NAME,
    Absent,
    Capacity,
    Change,
    ChangedAdapterError,
    Entry,
    NoRoomError,
    Place,
    Prepared,
    Version,
    check_public_name,
)
from topwork.models.base import Base

MESSAGE_CHARACTERS = 600


class Registry:
    """The adapters of one base that is being served."""

    def __init__(
        self,
        base: Base,
        adapters: Adapters,
        capacity: Capacity = Capacity(),
        reserved: Sequence[str] = (),
        limits: ReadLimits = ReadLimits(),
    ) -> None:
        """reserved: public names that no adapter may have: the base's own, first the one that clients know it by.
        Adapters that stand in the base already are left alone."""
        self.adapters, self.capacity, self.limits = adapters, capacity, limits
        self.reserved = tuple(reserved)
        self._base = BaseId(base.name, base.fingerprint)
        self._dtype = base.module.dtype
        self._bare = adapters.bare()
        self._entries: dict[str, Entry] = {}
        self._versions: dict[str, Version] = {}
        self._contents: dict[str, str] = {}
        self._numbers, self._clock = itertools.count(1), itertools.count(1)
        self._watching: list[Callable[[Change], None]] = []

    @property
    def contents(self) -> Mapping[str, str]:
        """The name in the base -> the hash of the content, of every version there: a view that changes with them."""
        return MappingProxyType(self._contents)

    @property
    def memory_bytes(self) -> int:
        """What all versions in the base hold."""
        return sum(version.memory_bytes for version in self._versions.values())

    def on_change(self, told: Callable[[Change], None]) -> None:
        """Have `told` called right after a version came into the base and right before one leaves it. What it raises
        nobody catches."""
        self._watching.append(told)

    def prepare(
        self, name: str, folder: Path, source: str | None = None, within: Sequence[Path] | None = None,
        force: bool = False, content: str | None = None,
    ) -> Prepared:  # fmt: skip
        """Read an adapter's folder and build what goes into the base, which is not changed. On any thread.

        source  the label that clients see; its name, where left out
        within  the folders in which links in it may lead (`read_foreign`)
        force   take it though it was trained on another base
        content the hash of what it has to be; None takes whatever there is

        Raises UnknownAdapterError where there is no such folder, ChangedAdapterError where it holds something else,
        AdapterError for everything else that is wrong; no message tells a path of this machine.
        """
        check_public_name(name, self.reserved)
        place = Place(folder, None if within is None else tuple(within))
        return self._prepared(name, source or name, place, force, content)

    def prepare_again(self, absent: Absent) -> Prepared:
        """The same adapter, out of its folder. On any thread. Raises ChangedAdapterError where that holds another by
        now, AdapterError where it cannot be read any more."""
        return self._prepared(absent.name, absent.source, absent.place, True, absent.content)

    def install(self, prepared: Prepared, replace: bool = False, pinned: bool = False) -> Entry:
        """Have the name stand for what was prepared, from now on.

        Content that is in the base already, under whatever name, is not put there twice; where there is no room beside
        what is in use, it waits outside until it is asked for. With `replace` the name may be taken: what it stood for
        drains. Raises AdapterError for a name that is taken otherwise, and where another adapter is in its way; nothing
        is changed then.
        """
        before = self._entries.get(prepared.name)
        if before is not None and not replace:
            raise AdapterError(
                f"the name {prepared.name!r} is taken; unload it first, or ask for it to be replaced (load_inplace)"
            )
        version = self._grafted(prepared, before)
        entry = Entry(
            prepared.name, prepared.content, prepared.source, prepared.place, pinned, int(time.time()), version
        )
        self._entries[prepared.name] = entry
        if before is not None and before.version is not None:
            self._drop_if_idle(before.version)
        return entry

    def restore(self, prepared: Prepared) -> None:
        """Bring back what was not in memory. Where its name has gone or stands for another meanwhile, or where it is
        back already, nothing is done: `admit` tells. Raises NoRoomError where it does not fit beside what is in use."""
        entry = self._entries.get(prepared.name)
        if entry is None or entry.version is not None or entry.content != prepared.content:
            return
        entry.version = self._grafted(prepared)
        if entry.version is None:
            raise NoRoomError(
                f"{_called(prepared.name)} does not fit beside {len(self._versions)} that are in use; try again later"
            )

    def admit(self, name: str) -> Version | Absent:
        """The version that the name stands for now, with a use more; `release` takes that back. Absent where it is not
        in memory: no use is counted then. Raises UnknownAdapterError for a name that nothing is loaded under."""
        entry = self.entry(name)
        if entry.version is None:
            entry.version = self._known(entry.content)
        if entry.version is None:
            return Absent(entry.name, entry.content, entry.source, entry.place)
        entry.version.uses += 1
        entry.version.asked = next(self._clock)
        return entry.version

    def release(self, version: Version) -> None:
        """A request has ended. A version that no name stands for any more leaves the base with its last use."""
        if version.uses < 1:
            raise RuntimeError(f"{version.adapter} was released more often than it was admitted")
        version.uses -= 1
        self._drop_if_idle(version)

    def unload(self, name: str) -> None:
        """The name is gone; what it stood for goes with its last use. Raises UnknownAdapterError."""
        entry = self.entry(name)
        del self._entries[name]
        if entry.version is not None:
            self._drop_if_idle(entry.version)

    def entry(self, name: str) -> Entry:
        """What a name stands for. Raises UnknownAdapterError."""
        if name not in self._entries:
            near = did_you_mean(name, self._entries) if len(name) <= LONGEST_NAME else ""
            raise UnknownAdapterError(f"there is no model {quoted(name)} here{near}")
        return self._entries[name]

    def names(self) -> list[str]:
        """Those that may be asked for, in memory or not, in the order they came."""
        return list(self._entries)

    def entries(self) -> list[Entry]:
        """What they stand for."""
        return list(self._entries.values())

    def versions(self) -> list[Version]:
        """Those in the base, in the order they came; draining ones too."""
        return list(self._versions.values())

    def _prepared(self, name: str, source: str, place: Place, force: bool, content: str | None) -> Prepared:
        called = _called(name)
        try:
            found = read_foreign(place.folder, called, place.within, self.limits, self.adapters.methods)
            if content not in (None, found.content):
                raise ChangedAdapterError(
                    f"{called} is not what it was when it was loaded: its folder holds another by now; load that under "
                    "the name anew, or put the old one back"
                )
            shown = self.reserved[0] if self.reserved else None
            warning = check_base(found.saved, self._base, force, shown)
            check_patterns(found.saved.config, list(self._bare.modules))
            fit = fitted(self._bare, found.saved, self.adapters.methods)
            warning = "; ".join([*([warning] if warning else []), *fit.notes]) or None
            freeze(fit.parts, self._bare, self._dtype)
        except (UnknownAdapterError, ChangedAdapterError):
            raise
        except TopworkError as error:
            told = str(error) if str(error).startswith(called) else f"{called}: {error}"
            raise AdapterError(shortened(told, MESSAGE_CHARACTERS)) from None
        except Exception as error:  # options or tensors that make no sense, in a way that nobody has thought of
            raise AdapterError(f"{called} cannot be read ({type(error).__name__})") from error
        return Prepared(name, found.content, source, place, fit.config, fit.parts, held_bytes(fit.parts), warning)

    def _known(self, content: str) -> Version | None:
        return next((version for version in self._versions.values() if version.content == content), None)

    def _grafted(self, prepared: Prepared, leaving: Entry | None = None) -> Version | None:
        """The version in the base that has this content: one that is there, or what was prepared. None where it does
        not fit; `leaving` is about to lose its name."""
        if (known := self._known(prepared.content)) is not None:
            return known
        to_leave = self._to_leave(prepared.memory_bytes, leaving)
        if to_leave is None:
            return None
        adapter = next(name for name in map("v{}".format, self._numbers) if name not in self.adapters.configs)
        self.adapters.put(adapter, prepared.config, prepared.parts)
        for old in to_leave:
            self._remove(old)
        version = Version(prepared.name, adapter, prepared.content, prepared.source, prepared.memory_bytes)
        version.asked = next(self._clock)
        self._versions[adapter], self._contents[adapter] = version, version.content
        for told in self._watching:
            told(Change("grafted", version))
        return version

    def _to_leave(self, coming_bytes: int, leaving: Entry | None) -> list[Version] | None:
        """Which leave memory so that one of this size can come; None where not enough of them may."""
        count, memory_bytes = len(self._versions) + 1, self.memory_bytes + coming_bytes
        found: list[Version] = []
        candidates = self._idle(leaving)
        while not self.capacity.holds(count, memory_bytes):
            version = next(candidates, None)
            if version is None:
                return None
            found.append(version)
            count, memory_bytes = count - 1, memory_bytes - version.memory_bytes
        return found

    def _idle(self, leaving: Entry | None) -> Iterator[Version]:
        """Those that may leave memory: first one that is about to lose its name, then those asked for longest ago."""
        others = [entry for entry in self._entries.values() if entry is not leaving]
        pinned = {id(entry.version) for entry in others if entry.pinned}
        named = {id(entry.version) for entry in others}
        idle = [version for version in self._versions.values() if not version.uses and id(version) not in pinned]
        yield from sorted(idle, key=lambda version: (id(version) in named, version.asked))

    def _drop_if_idle(self, version: Version) -> None:
        """A version that no name stands for and no request uses leaves the base."""
        named = any(entry.version is version for entry in self._entries.values())
        if not version.uses and not named and version.adapter in self._versions:
            self._remove(version)

    def _remove(self, version: Version) -> None:
        for told in self._watching:
            told(Change("removed", version))
        for entry in self._entries.values():
            if entry.version is version:
                entry.version = None
        del self._versions[version.adapter], self._contents[version.adapter]
        self.adapters.remove(version.adapter)


def _called(name: str) -> str:
    return f"adapter {shortened(repr(name), 80)}"
