"""The adapters of a vLLM: what it is told of, under which names, and until when.

vLLM knows an adapter by a name that says its content, so a changed one is another adapter to it, and no prompt that was
cached for the old one is met; the names that clients use are ours alone. A version leaves vLLM when no name stands for
it and its last request has ended.
"""

import asyncio
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import time

from topwork.adapters.foreign import read_foreign
from topwork.adapters.foreign_patterns import check_patterns
from topwork.adapters.peft_format import check_base, settle
from topwork.common.errors import AdapterError, RequestError, UnknownAdapterError
from topwork.export.readers import VLLM_RANKS
from topwork.generation.versions import ChangedAdapterError, check_public_name
from topwork.serving.backends.backend import Call, Card, Refused
from topwork.serving.backends.preflight import Taken, for_vllm
from topwork.serving.backends.vllm_base import HandedOver
from topwork.serving.backends.vllm_client import Hide, VllmClient

log = logging.getLogger("topwork.serving")

PREFIX = "topwork-"


@dataclass(eq=False)
class Version:
    """An adapter as vLLM knows it; how many requests run with it, and how many names stand for it."""

    internal: str
    folder: Path
    uses: int = 0
    names: int = 0


@dataclass(frozen=True)
class Named:
    """What a public name stands for."""

    card: Card
    version: Version


class Use:
    """One request's version, from its admission to `end`."""

    def __init__(self, internal: str, hide: Hide, end: Callable[[], None]) -> None:
        self.internal, self.hide, self._end = internal, hide, end
        self._over = False

    def end(self) -> None:
        """The request has ended. Twice is once."""
        if not self._over:
            self._over = True
            self._end()


class VllmAdapters:
    """Those of one vLLM, on the event loop."""

    def __init__(self, served: str, reserved: Sequence[str], base: HandedOver, work: Path) -> None:
        """reserved: names that no adapter may have."""
        self.served, self.reserved, self.base = served, reserved, base
        self.folder = (work / "adapters").resolve()
        self.named: dict[str, Named] = {}
        self.versions: dict[str, Version] = {}
        self.most, self.context_length = VLLM_RANKS[-1], 0
        self._changing = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()
        self.client: VllmClient | None = None

    def all_taken(self, folders: Mapping[str, Path], say: Callable[[str], None]) -> dict[str, Taken]:
        """Those to begin with, as vLLM will have them; RequestError with all that it would refuse, by name."""
        taken, wrong = {}, []
        for name, folder in folders.items():
            try:
                taken[name] = self.taken(name, folder)
            except AdapterError as error:
                wrong.append(str(error))
        if wrong:
            raise RequestError("\n".join(wrong))
        for name, adapter in taken.items():
            for change in adapter.changes:
                say(f"adapter {name}: {change}")
        return taken

    def taken(self, name: str, folder: Path, within: Sequence[Path] | None = None, content: str | None = None) -> Taken:
        """One that was read, checked and found to be such as vLLM takes. Raises AdapterError."""
        check_public_name(name, self.reserved)
        found = read_foreign(folder, f"adapter {name!r}", within)
        if content not in (None, found.content):
            raise ChangedAdapterError(f"adapter {name!r} is not what it was when it was loaded")
        warning = check_base(found.saved, self.base.id, shown=self.served)
        if warning is not None:
            log.warning(warning)
        try:
            check_patterns(found.saved.config, list(self.base.skeleton.modules))
        except AdapterError as error:
            raise AdapterError(f"adapter {name!r}: {error}") from None
        adapter = for_vllm(name, found, self.base.skeleton, self.most)
        for note in settle(found.saved, self.base.skeleton).notes:
            log.warning("adapter %r: %s", name, note)
        return adapter

    def written(self, taken: Sequence[Taken]) -> dict[str, Path]:
        """Their folders by vLLM's names, and no others: what an earlier life has left there goes."""
        folders = {internal_name(adapter): self.folder / adapter.key for adapter in taken}
        for old in self.folder.glob("*"):
            if old not in folders.values():
                shutil.rmtree(old, ignore_errors=True)
        for adapter in taken:
            adapter.write(self.folder / adapter.key)
        return folders

    async def load(
        self, name: str, folder: Path, replace: bool, within: Sequence[Path] | None, content: str | None
    ) -> Card:
        """`backend.Backend.load`."""
        async with self._changing:
            if name in self.named and not replace:
                raise AdapterError(f"the name {name!r} is taken; unload it first, or ask for it to be replaced")
            taken = await asyncio.to_thread(self.taken, name, folder, within, content)
            if (internal := internal_name(taken)) not in self.versions:
                place = self.folder / taken.key
                await asyncio.to_thread(taken.write, place)
                try:
                    await self.tell_of(internal, place)
                except Refused as refused:
                    await asyncio.to_thread(shutil.rmtree, place, True)
                    if refused.status >= 500:
                        raise
                    raise AdapterError(f"adapter {name!r} was refused by vLLM: {refused.message}") from refused
            return self.point(name, taken)

    def unload(self, name: str) -> None:
        """The name is gone. Raises UnknownAdapterError."""
        named = self.named.pop(name, None)
        if named is None:
            raise UnknownAdapterError(f"there is no adapter {name!r} here")
        named.version.names -= 1
        self._drop_if_idle(named.version)

    def use(self, call: Call) -> Use:
        """The version that the call's model stands for now. Raises Refused (404)."""
        if call.model == self.served:
            return Use(self.served, self._hidden(self.served, call.shown), lambda: None)
        named = self.named.get(call.model)
        if named is None:
            raise Refused(404, f"there is no model {call.shown!r} here", "not_found_error", "model", "model_not_found")
        version, told = named.version, getattr(call.parsed, "version", None)
        if told is not None:
            told(named.card.content.removeprefix("sha256:")[:12])
        version.uses += 1

        def end() -> None:
            version.uses -= 1
            self._drop_if_idle(version)

        return Use(version.internal, self._hidden(version.internal, call.shown), end)

    def point(self, name: str, taken: Taken) -> Card:
        """The name stands for this, which vLLM has, from now on; what it stood for drains."""
        internal = internal_name(taken)
        version = self.versions.setdefault(internal, Version(internal, self.folder / taken.key))
        version.names += 1
        before = self.named.get(name)
        card = Card(name, int(time()), name, self.served, self.context_length, taken.content)
        self.named[name] = Named(card, version)
        if before is not None:
            before.version.names -= 1
            self._drop_if_idle(before.version)
        return card

    async def tell_of(self, internal: str, folder: Path) -> None:
        """Have vLLM load it. Raises Refused."""
        assert self.client is not None
        body = {"lora_name": internal, "lora_path": str(folder)}
        try:
            await self.client.post("/v1/load_lora_adapter", body, self._hidden(internal, "the adapter"))
        except Refused as refused:
            if "already been loaded" not in refused.message:  # under this name it is the same, to the byte
                raise

    async def tell_again(self, internal: str) -> bool:
        """To one that was started anew and has forgotten. False for what is no adapter."""
        version = self.versions.get(internal)
        if version is not None:
            await self.tell_of(internal, version.folder)
        return version is not None

    async def close(self, leave: bool) -> None:
        """Nothing more is loaded or unloaded; with `leave` vLLM, which goes on, forgets what is ours."""
        for task in list(self._leaving):
            task.cancel()
        for internal in list(self.versions) if leave else ():
            await self._forgotten(internal)

    def _drop_if_idle(self, version: Version) -> None:
        if not self._idle(version):
            return
        task = asyncio.get_running_loop().create_task(self._dropped(version))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _idle(self, version: Version) -> bool:
        return not version.uses and not version.names and self.versions.get(version.internal) is version

    async def _dropped(self, version: Version) -> None:
        """It leaves vLLM, and its folder goes, unless somebody has asked for it anew meanwhile."""
        async with self._changing:
            if self._idle(version):
                del self.versions[version.internal]
                await self._forgotten(version.internal)
                await asyncio.to_thread(shutil.rmtree, version.folder, True)

    async def _forgotten(self, internal: str) -> None:
        assert self.client is not None
        try:
            await self.client.post("/v1/unload_lora_adapter", {"lora_name": internal})
        except Refused as refused:
            log.warning("vLLM did not unload %s: %s", internal, refused.message)

    def _hidden(self, internal: str, shown: str) -> Hide:
        """A message of vLLM's without its names and our folders."""
        place = str(self.folder.parent)
        return lambda text: text.replace(internal, shown).replace(place, "…")


def internal_name(taken: Taken) -> str:
    """What vLLM calls exactly this adapter."""
    return f"{PREFIX}{taken.key}"
