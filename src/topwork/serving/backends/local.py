"""The engine of this process, as the app asks for answers (`backend.Backend`)."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any, Self

from topwork.adapters.foreign import adapter_folder
from topwork.common.errors import AdapterError, RequestError, RunError, UnknownAdapterError, quoted
from topwork.data.chat.template import ChatTemplate
from topwork.generation.registry import Registry
from topwork.generation.requests import Request
from topwork.generation.text import TextStream
from topwork.generation.versions import Absent, ChangedAdapterError, NoRoomError, Version
from topwork.generation.versions import Prepared as Back
from topwork.models.base import Base
from topwork.serving.answering import Answering
from topwork.serving.asking import Prepared, Reader, is_long
from topwork.serving.backends.backend import Call, Card, Chunks, Health, Weighed
from topwork.serving.chat import ChatAnswer
from topwork.serving.completions import CompletionAnswer
from topwork.serving.errors import ApiError, without_paths
from topwork.serving.openai import ChatRequest, CompletionRequest
from topwork.serving.worker import Admitted, Worker

log = logging.getLogger("topwork.serving")

SHORT = 12
"""Characters of a content hash that are told."""
TRIES = 3
"""How often an adapter that left memory is read again for one request, before it is told that there is no room."""


@dataclass
class Reading:
    """A request as the app has read it (`Call.parsed`), and what it wants to be told of it."""

    asked: ChatRequest | CompletionRequest
    id: str
    version: Callable[[str], None] = lambda _: None
    """Told the short content hash of the adapter that answers."""
    token: Callable[[int, float | None], None] = lambda *_: None
    """Told the choice of each token that counts, and with its first when its prompt began to be read."""
    prepared: Prepared | None = None


@dataclass(frozen=True)
class _Named:
    """What a name stands for."""

    card: Card
    template: ChatTemplate


@dataclass
class LocalBackend:
    """One base, its engine, its adapters.

    served     what requests call the base
    template   the base's; adapters that came with another are in `load`'s hands
    most       answers that may run or wait, all together
    within     in adapters from below these folders links must lead there; in others anywhere
    force      adapters of another base are taken, with a warning
    templates  gives a folder's own chat template, None where it has none
    """

    base: Base
    served: str
    template: ChatTemplate
    reader: Reader
    worker: Worker
    registry: Registry
    most: int
    within: Sequence[Path] = ()
    force: bool = False
    templates: Callable[[Path], ChatTemplate | None] = lambda _: None
    created: int = field(default_factory=lambda: int(time()))

    def __post_init__(self) -> None:
        self._named: dict[str, _Named] = {}
        self._loading = asyncio.Lock()
        self._ready = False

    async def start(self) -> None:
        """The engine's thread begins."""
        self.worker.start()
        self._ready = True

    async def stop(self, grace_seconds: float) -> None:
        """The app has let what ran end; what still does is told that it failed."""
        self._ready = False
        try:
            async with asyncio.timeout(grace_seconds):
                while self.worker.running and self.worker.alive:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            pass
        await self.worker.close()

    def cards(self) -> Sequence[Card]:
        """The base first, then adapters by name."""
        base = Card(self.served, self.created, self.served, None, self.base.context_length)
        return [base, *(self._named[name].card for name in sorted(self._named))]

    async def weigh(self, call: Call) -> Weighed:
        """Reads a request to the end: all that is wrong with it is told here."""
        reading: Reading = call.parsed
        read = self._read(reading.asked, call.model)
        reading.prepared = await asyncio.to_thread(read) if is_long(reading.asked) else read()
        most = sum(sampling.max_new_tokens for sampling in reading.prepared.samplings)
        return Weighed(reading.prepared.prompt_tokens, most, reading.prepared.choices)

    async def answer(self, call: Call) -> dict[str, Any]:
        """The whole answer."""
        shape, answering = await self._begin(call)
        for _ in shape.opening():
            pass
        async with aclosing(answering.pieces()) as pieces:
            async for piece in pieces:
                for _ in shape.take(piece):
                    pass
        return shape.whole()

    async def stream(self, call: Call) -> Chunks:
        """Its chunks."""
        return _Chunks(*await self._begin(call))

    async def load(
        self, name: str, folder: Path, replace: bool = False, pinned: bool = False, content: str | None = None
    ) -> Card:  # fmt: skip
        """Reads and checks it beside the engine; it is put in between two steps."""
        within = self.within if self.within and any(one in folder.resolve().parents for one in self.within) else None
        async with self._loading:
            prepared = await asyncio.to_thread(
                self.registry.prepare, name, adapter_folder(folder), within=within, force=self.force
            )
            if content is not None and prepared.content != content:
                raise ChangedAdapterError(f"adapter {name!r}: its folder holds another one than when it was loaded")
            if prepared.warning:
                log.warning(prepared.warning)
            own = await asyncio.to_thread(self.templates, folder)
            entry = await self.worker.call(lambda: self.registry.install(prepared, replace, pinned))
            card = Card(name, entry.created, entry.source, self.served, self.base.context_length, entry.content)
            self._named[name] = _Named(card, own or self.template)
            return card

    async def unload(self, name: str) -> None:
        """Gone at once; its weights when its last request has ended."""
        self._named.pop(name, None)
        await self.worker.call(lambda: self.registry.unload(name))
        self._named.pop(name, None)  # that of a load which the engine's thread had taken before

    def health(self) -> Health:
        """Dead where the engine's thread is."""
        if not self.worker.alive:
            return Health(False, False, "the engine's thread has ended")
        return Health(True, self._ready)

    async def metrics(self) -> str:
        """The app's meter is told the engine's figures as they change."""
        return ""

    def _read(self, asked: ChatRequest | CompletionRequest, model: str) -> Callable[[], Prepared]:
        if isinstance(asked, CompletionRequest):
            return lambda: self.reader.completion(asked)
        template = self._named[model].template if model in self._named else self.template
        return lambda: self.reader.chat(asked, template)

    async def _begin(self, call: Call) -> tuple[ChatAnswer | CompletionAnswer, Answering]:
        reading: Reading = call.parsed
        prepared = reading.prepared
        assert prepared is not None
        if self.worker.running + prepared.choices > self.most:
            busy = f"{self.worker.running} answers run or wait, and no more are taken; ask again in a moment"
            raise ApiError(429, busy, code="queue_full", retry_after=1)
        with refusals(prepared.use is not None):
            admitted = await self._admit(call, reading, prepared)
        tokenizer = self.base.tokenizer
        texts = [
            TextStream(tokenizer, prepared.stops, prepared.include_stop, prepared.shown, prepared.goes_on_from(choice))
            for choice in range(prepared.choices)
        ]
        answering = Answering(self.worker, admitted, texts, reading.token)
        created = int(time())
        if isinstance(reading.asked, ChatRequest):
            return ChatAnswer(reading.asked, prepared, tokenizer, reading.id, created, call.shown), answering
        return CompletionAnswer(reading.asked, prepared, tokenizer, reading.id, created, call.shown), answering

    async def _admit(self, call: Call, reading: Reading, prepared: Prepared) -> Admitted:
        """All choices or none, of the version that the name stands for now; read again where it had left memory."""
        for _ in range(TRIES):
            with suppress(_Away):
                return await self._enter(call, reading, prepared)
            async with self._loading:
                try:  # others have waited for the same one, and the first of them has brought it back
                    return await self._enter(call, reading, prepared)
                except _Away as away:
                    back = await asyncio.to_thread(self.registry.prepare_again, away.absent)
                with suppress(_Away):
                    return await self._enter(call, reading, prepared, back)
        raise NoRoomError(f"{quoted(call.model)} has left memory again and again; too many adapters are asked for")

    async def _enter(self, call: Call, reading: Reading, prepared: Prepared, back: Back | None = None) -> Admitted:
        versions: list[Version] = []
        salt = "/".join((call.salt, reading.asked.cache_salt or ""))

        def enter() -> tuple[Sequence[Request], Callable[[], None]]:
            if call.model == self.served:
                return self._requests(prepared, None, salt, call.share), _nothing
            if back is not None:
                self.registry.restore(back)
            for _ in range(prepared.choices):
                found = self.registry.admit(call.model)
                if isinstance(found, Absent):
                    raise _Away(found)
                versions.append(found)
            version = versions[0]
            return self._requests(prepared, version.adapter, salt, call.share), lambda: self.registry.release(version)

        admitted = await self.worker.admit(enter, prepared.choices)
        if versions:
            reading.version(versions[0].content.rpartition(":")[2][:SHORT])
        return admitted

    def _requests(self, prepared: Prepared, adapter: str | None, salt: str, share: str) -> list[Request]:
        return [
            Request(prepared.prompt_of(choice), adapter, prepared.stop_ids, sampling, obeys, salt, share)
            for choice, (sampling, obeys) in enumerate(zip(prepared.samplings, prepared.constraints))
        ]


class _Chunks:
    """A request's chunks. A generator that nobody has begun would not end its request when it is closed."""

    def __init__(self, shape: ChatAnswer | CompletionAnswer, answering: Answering) -> None:
        self._answering, self._made = answering, self._make(shape)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        return await anext(self._made)

    async def aclose(self) -> None:
        self._answering.end()
        await self._made.aclose()

    async def _make(self, shape: ChatAnswer | CompletionAnswer) -> AsyncGenerator[dict[str, Any], None]:
        for chunk in shape.opening():
            yield chunk
        async with aclosing(self._answering.pieces()) as pieces:
            async for piece in pieces:
                for chunk in shape.take(piece):
                    yield chunk
        yield shape.counted()


class _Away(Exception):
    """The adapter is not in memory."""

    def __init__(self, absent: Absent) -> None:
        super().__init__(absent.name)
        self.absent = absent


@contextmanager
def refusals(chat: bool) -> Iterator[None]:
    """What the registry and the engine refuse, as statuses."""
    try:
        yield
    except UnknownAdapterError as error:
        raise ApiError(404, without_paths(str(error)), "model", "model_not_found") from error
    except NoRoomError as error:
        raise ApiError(503, without_paths(str(error)), "model", "no_room", retry_after=1) from error
    except AdapterError as error:
        raise ApiError(500, without_paths(str(error)), "model", "adapter_lost") from error
    except RunError as error:
        raise ApiError(503, without_paths(str(error)), code="engine_stopped") from error
    except RequestError as error:
        raise ApiError(400, without_paths(str(error)), "messages" if chat else "prompt") from error


def _nothing() -> None:
    pass
