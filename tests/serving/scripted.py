"""A whole server over a tiny base, whose engine says what a script has for each request: one token a step."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from reference.families import randomise
from run.tiny import write_model
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, write_adapter
from topwork.data.chat.template import ChatTemplate
from topwork.generation.registry import Registry
from topwork.generation.requests import Event, Request
from topwork.models.base import Base
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.serving.app import create_app
from topwork.serving.asking import Reader
from topwork.serving.backends.local import LocalBackend
from topwork.serving.config import ServeConfig
from topwork.serving.seams import Parts
from topwork.serving.service import Service
from topwork.serving.shutdown import Server
from topwork.serving.worker import Worker

BASE = "tiny"


@dataclass
class ScriptedEngine:
    """say(request) -> the tokens of its answer; it ends with a stop token after them, or where it has no room.

    gate   a step waits until it is set
    least  and until so many run
    fail   what the next steps raise, first to last
    """

    say: Callable[[Request], Sequence[int]]
    gate: threading.Event = field(default_factory=threading.Event)
    fail: list[Exception] = field(default_factory=list)
    least: int = 0
    steps: int = 0
    cancelled: list[int] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()
        self.running: dict[int, tuple[Request, list[int], int]] = {}

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def submit(self, request: Request) -> int:
        id = len(self.requests)
        self.requests.append(request)
        self.running[id] = request, list(self.say(request)), 0
        return id

    def cancel(self, id: int) -> None:
        if self.running.pop(id, None) is not None:
            self.cancelled.append(id)

    def close(self) -> None:
        self.running.clear()

    def step(self) -> list[Event]:
        if len(self.running) < self.least:
            time.sleep(0.001)
            return []
        self.gate.wait(20)
        self.steps += 1
        if self.fail:
            raise self.fail.pop(0)
        return [self._next(id) for id in list(self.running)]

    def _next(self, id: int) -> Event:
        request, tokens, said = self.running[id]
        if said == len(tokens):
            del self.running[id]
            return Event(id, ended="stop")
        told: dict[str, Any] = {}
        if (count := request.sampling.logprobs) is not None:
            told = {"logprob": -0.5, "likeliest": tuple((tokens[said] + i, -0.5 - i) for i in range(count))}
        if said + 1 == request.sampling.max_new_tokens:
            del self.running[id]
            return Event(id, tokens[said], "length", **told)
        self.running[id] = request, tokens, said + 1
        return Event(id, tokens[said], **told)


@dataclass
class Scripted:
    """The parts of a server at hand."""

    service: Service
    backend: LocalBackend
    engine: ScriptedEngine
    registry: Registry
    app: Any
    client: httpx.AsyncClient

    def until(self, true: Callable[[], bool]) -> Awaitable[None]:
        """Waits until something that another thread does is so."""

        async def wait() -> None:
            async with asyncio.timeout(20):
                while not true():
                    await asyncio.sleep(0.002)

        return wait()


def tiny(folder: Path) -> Base:
    """A random base with a tokenizer and a chat template, and room for tools in its context."""
    written = write_model(folder / BASE)
    values = json.loads((written / "config.json").read_text())
    (written / "config.json").write_text(json.dumps({**values, "max_position_embeddings": 2048}))
    config = ModelConfig(model_name_or_path=str(written), dtype="float32", device="cpu")
    return load_base(config, lambda _: None)


def adapter_folder(base: Base, folder: Path, seed: int = 1) -> Path:
    """A LoRA of its own, as PEFT has it."""
    grafted = Adapters(base.module)
    grafted.add("made", AdapterConfig(r=2, lora_alpha=8), seed=seed)
    randomise(grafted, "made", seed)
    write_adapter(folder, grafted, "made", BaseId(base.name, base.fingerprint))
    grafted.remove("made")
    return folder


def words(base: Base, text: str) -> list[int]:
    """The text's tokens."""
    return list(base.tokenizer(text, add_special_tokens=False)["input_ids"])


@asynccontextmanager
async def scripted(
    base: Base, say: Callable[[Request], Sequence[int]], parts: Parts | None = None, **values: Any
) -> AsyncIterator[Scripted]:
    """A server that was started; ended afterwards, and then nothing is left in it."""
    config = ServeConfig.model_validate({"model": {"model_name_or_path": BASE}, **values})
    engine = ScriptedEngine(say)
    registry = Registry(base, Adapters(base.module, base.tokenizer), reserved=(BASE,))
    parts = parts or Parts()
    within = [] if config.adapters_folder is None else [Path(config.adapters_folder).resolve()]
    backend = LocalBackend(
        base, BASE, ChatTemplate(base.tokenizer), Reader(base, config.limits),
        Worker(engine, parts.meter.stepped), registry, config.engine.batch_size + config.engine.max_waiting, within,
    )  # fmt: skip
    service = Service(config, backend, parts)
    await backend.start()
    app = create_app(service)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with asyncio.timeout(60), httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        try:
            for name, path in config.adapters.items():
                await backend.load(name, Path(path))
            yield Scripted(service, backend, engine, registry, app, client)
        finally:
            engine.least = 0
            engine.gate.set()
            await backend.stop(5)
            assert not service.running
            assert backend.worker.running == 0
            assert all(version.uses == 0 for version in registry.versions())
            for name in registry.names():
                registry.unload(name)
            torch.manual_seed(0)


@contextmanager
def served(
    base: Base, say: Callable[[Request], Sequence[int]], **values: Any
) -> Iterator[tuple[Scripted, Server, tuple[str, int]]]:
    """The same behind a real socket of this machine, in a thread of its own; the server is told to end afterwards."""
    ready, found = threading.Event(), []

    async def run() -> None:
        async with scripted(base, say, **values) as made:
            server = Server(made.app, made.service)
            listener = socket.create_server(("127.0.0.1", 0))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
            found.append((made, server, listener.getsockname()))
            asyncio.get_running_loop().call_soon(ready.set)
            await server.serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert ready.wait(20)
        yield found[0]
    finally:
        found[0][0].engine.gate.set()
        if thread.is_alive():
            found[0][1].stop()
        thread.join(20)
        assert not thread.is_alive()
