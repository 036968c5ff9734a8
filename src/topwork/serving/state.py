"""What a server knows that its configuration does not say, kept so that it survives `kill -9`: the adapters that were
loaded while it ran, those of the configuration that were unloaded, and what was said of routes.

    FOLDER/state.json         written aside, fsynced and renamed at each change (`common/files.py`)
    FOLDER/state.damaged-N    one that could not be read, put there with a warning
    FOLDER/server.lock        held while a server uses the folder; a process that dies lets go of it

An adapter that is read again has to be the one it was: its content's hash is kept, and another content in its folder is
reported, never served in its place.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError

from topwork.common.errors import RequestError, TopworkError
from topwork.common.files import clear_leftovers, write_json
from topwork.common.options import Options

STATE, LOCK = "state.json", "server.lock"
Say = Callable[[str], None]


class KeptAdapter(Options):
    """An adapter that was loaded while the server ran."""

    name: str = Field(min_length=1)
    folder: str = Field(min_length=1)
    content: str = Field(pattern=r"^(sha256:[0-9a-f]{64})?$")
    """The hash of what the folder held; empty where nobody knew it."""
    pinned: bool = False


class State(Options):
    """What `state.json` holds."""

    version: Literal[1] = 1
    base: str | None = None
    """The base's fingerprint: adapters of another are not brought back."""
    adapters: list[KeptAdapter] = Field(default_factory=list)
    """In the order they were loaded; one of the configuration's names stands for this and not for what that says."""
    unloaded: dict[str, str] = Field(default_factory=dict)
    """The configuration's adapters that were unloaded: name -> folder. Where it names another folder by now, that is
    loaded."""
    routes: dict[str, Any] = Field(default_factory=dict)
    """What `routes.py` has to know again."""


@dataclass(frozen=True)
class ToLoad:
    """An adapter that a server begins with.

    content     what it has to be; None where the configuration names it, whatever it is
    configured  whether the configuration names it; one that does not come is a mistake then, and a warning otherwise
    """

    name: str
    folder: Path
    content: str | None
    pinned: bool
    configured: bool


class StateFolder:
    """The folder of one server. Raises RequestError where another server uses it, or where it cannot be written."""

    def __init__(self, folder: Path, say: Say = print) -> None:
        self.folder, self.path = folder, folder / STATE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / LOCK, timeout=0)
            self._lock.acquire()
        except Timeout:
            raise RequestError(
                f"another server uses the state folder {folder}; give each its own state_folder, or end the other"
            ) from None
        except OSError as error:
            raise RequestError(f"the state folder {folder} cannot be used ({error.strerror}); name another") from None
        clear_leftovers(folder, STATE)
        self.state = self._read(say)

    def close(self) -> None:
        """Let another server have it."""
        self._lock.release()

    def for_base(self, fingerprint: str | None, say: Say = print) -> None:
        """Which base is served from now on. What was kept for another is forgotten, with a warning."""
        kept = self.state
        if kept.base is not None and fingerprint is not None and kept.base != fingerprint:
            if kept.adapters:
                names = ", ".join(repr(adapter.name) for adapter in kept.adapters)
                say(f"warning: {self.path} was written for another base; not brought back: {names}")
            kept = State(routes=kept.routes)
        self._write(kept.model_copy(update={"base": fingerprint}))

    def to_load(self, configured: Mapping[str, Path], say: Say = print) -> list[ToLoad]:
        """The configuration's adapters as they were left, then those that were loaded since, in the order they came.

        One that stays away, or comes from another folder than the configuration says, is told of.
        """
        kept = {adapter.name: adapter for adapter in self.state.adapters}
        found = [
            ToLoad(name, folder, None, True, True)
            for name, folder in configured.items()
            if name not in kept and self.state.unloaded.get(name) != str(folder.resolve())
        ]
        coming = {*kept, *(each.name for each in found)}
        for name in [name for name in configured if name not in coming]:
            say(
                f"warning: adapter {name!r} is not loaded: it was unloaded while the server ran ({self.path}); "
                "POST /v1/load_lora_adapter brings it back"
            )
        for name, folder in configured.items():
            if name in kept and kept[name].folder != str(folder.resolve()):
                say(f"adapter {name!r} comes from {kept[name].folder}, as it was loaded while the server ran")
        return found + [
            ToLoad(adapter.name, Path(adapter.folder), adapter.content or None, adapter.pinned, False)
            for adapter in self.state.adapters
        ]

    def loaded(self, name: str, folder: Path, content: str, pinned: bool = False) -> None:
        """A name stands for what is in this folder from now on."""
        others = [adapter for adapter in self.state.adapters if adapter.name != name]
        kept = KeptAdapter(name=name, folder=str(folder.resolve()), content=content, pinned=pinned)
        unloaded = {other: path for other, path in self.state.unloaded.items() if other != name}
        self._write(self.state.model_copy(update={"adapters": [*others, kept], "unloaded": unloaded}))

    def unloaded(self, name: str, configured: Mapping[str, Path]) -> None:
        """A name is gone; `configured` are the configuration's adapters."""
        others = [adapter for adapter in self.state.adapters if adapter.name != name]
        unloaded = dict(self.state.unloaded)
        if name in configured:
            unloaded[name] = str(configured[name].resolve())
        self._write(self.state.model_copy(update={"adapters": others, "unloaded": unloaded}))

    def keep_routes(self, routes: Mapping[str, Any]) -> None:
        """What routes have to know again; plain JSON values."""
        self._write(self.state.model_copy(update={"routes": dict(routes)}))

    def _write(self, state: State) -> None:
        write_json(self.path, state.model_dump())
        self.state = state

    def _read(self, say: Say) -> State:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return State()
        except (OSError, UnicodeDecodeError) as error:
            return self._set_aside(str(error), say)
        try:
            state = State.model_validate(json.loads(text))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            return self._set_aside(f"{where or 'it'}: {first['msg'].lower()}", say)
        except (ValueError, RecursionError) as error:
            return self._set_aside(f"it is not JSON ({error})", say)
        names = [adapter.name for adapter in state.adapters]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            return self._set_aside(f"adapters names {twice[0]!r} twice", say)
        return state

    def _set_aside(self, why: str, say: Say) -> State:
        """Start with nothing rather than with half of something; the file is there to be looked at."""
        number = 1
        while (aside := self.path.with_name(f"state.damaged-{number}")).exists():
            number += 1
        try:
            self.path.rename(aside)
        except OSError as error:
            told = f"{self.path} cannot be read ({why}), and not be put aside ({error.strerror})"
            raise RequestError(told) from None
        say(
            f"warning: {self.path} cannot be read ({why}), and was put aside as {aside.name}; what was loaded while "
            "the server ran, and routes that were changed, have to be loaded and changed again"
        )
        return State()


async def bring_back(found: Sequence[ToLoad], take: Callable[[ToLoad], Awaitable[object]], say: Say = print) -> None:
    """Load what a server begins with. One that is gone, or is another by now, is told of, and the rest come back; one
    that the configuration names has to come: what `take` raises for it is raised."""
    for each in found:
        try:
            await take(each)
        except TopworkError as error:
            if each.configured:
                raise
            say(f"warning: adapter {each.name!r} was loaded before the last end, and does not come back: {error}")
