"""What the endpoints share: who asks, who answers, how a request goes from one to the other, and what is told of it."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from time import monotonic
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from topwork.common.errors import did_you_mean, quoted
from topwork.serving.backends.backend import Backend, Card, Endpoint
from topwork.serving.backends.backend import Call as Asking
from topwork.serving.backends.local import Reading
from topwork.serving.calls import Watched, Way
from topwork.serving.config import ServeConfig
from topwork.serving.errors import ApiError
from topwork.serving.openai import UNSUPPORTED, ChatRequest, CompletionRequest
from topwork.serving.reading import read_fields
from topwork.serving.seams import Call, Caller, Parts, Target
from topwork.serving.streams import EventStream, Run

KINDS: dict[str, tuple[Endpoint, type[ChatRequest] | type[CompletionRequest], str]] = {
    "chat": ("chat/completions", ChatRequest, "chatcmpl-"),
    "completions": ("completions", CompletionRequest, "cmpl-"),
}
GOING = "the server is going down and takes no more requests; ask again in a moment, or another one"


@dataclass(frozen=True)
class Kept:
    """Who remembers what is loaded for the next start (`state.py`); nobody."""

    loaded: Callable[[Card, Path], None] = lambda *_: None
    unloaded: Callable[[str], None] = lambda _: None


@dataclass
class Service:
    """One server."""

    config: ServeConfig
    backend: Backend
    parts: Parts = field(default_factory=Parts)
    base_names: tuple[str, ...] = ()
    """What else the base may be called."""
    kept: Kept = field(default_factory=Kept)
    """Told of what is loaded and unloaded while it runs."""
    draining: bool = False
    """Nothing new is taken."""
    running: set[Run] = field(default_factory=set)

    def caller(self, request: Request) -> Caller:
        """Who asks. Raises ApiError: 401, and 503 while the server goes down."""
        caller = self.parts.gate.identify(request.headers)
        if self.draining:
            raise ApiError(503, GOING, code="shutting_down", retry_after=5)
        return caller

    def cards(self, caller: Caller) -> dict[str, Card]:
        """The models that the caller may see: the base, adapters, and routes as cards of their own."""
        cards = {card.id: card for card in self.backend.cards()}
        base = next(card for card in cards.values() if card.parent is None)
        for name in self.parts.router.names():
            cards.setdefault(name, Card(name, base.created, name, base.id, base.context_length))
        return {name: card for name, card in cards.items() if self.parts.gate.may_use(caller, name)}

    def target(self, caller: Caller, model: str, user: str | None, headers: Mapping[str, str]) -> Target:
        """Who answers. Raises ApiError (404) for what is not there or not for this caller, alike."""
        seen, known = self.cards(caller), {card.id: card for card in self.backend.cards()}
        if model in seen:
            target = self.parts.router.resolve(model, caller, user, headers)
            if target is None:
                return Target(None if seen[model].parent is None else model)
            if target.adapter is None or target.adapter in known:
                return target
            told = f"arm {target.arm!r} of {quoted(model)} has no adapter just now; it was unloaded"
            raise ApiError(404, told, "model", "model_not_found")
        base = next(name for name, card in known.items() if card.parent is None)
        if model in self.base_names and base in seen:
            return Target(None)
        raise self.unknown(model, seen)

    def unknown(self, model: str, seen: Mapping[str, Any]) -> ApiError:
        """404, with the nearest that there are."""
        near = did_you_mean(model[:64], seen)
        told = f"the model {quoted(model)} does not exist{near or '; GET /v1/models lists those that do'}"
        return ApiError(404, told, "model", "model_not_found")

    async def answer(self, request: Request, kind: str) -> Response:
        """The way of a request (`seams.py` has it in one line)."""
        arrived = monotonic()
        caller = self.caller(request)
        endpoint, fields, prefix = KINDS[kind]
        body, asked = await read_fields(request, fields, UNSUPPORTED)
        target = self.target(caller, asked.model, asked.user, request.headers)
        record = Call(
            prefix + token_hex(12),
            kind,
            caller,
            asked.model,
            target,
            asked.user,
            bool(asked.stream),
            arrived_at=arrived,
        )
        way = Way(self.parts, record, request, self.config.limits.request_seconds, self.running)
        asking = Asking(
            endpoint, body, target.adapter or self.base.id, asked.model, caller.salt, caller.share,
            Reading(asked, record.id, way.version, way.token),
        )  # fmt: skip
        with way.refusals():
            return await self._answer(way, asking, asked)

    @property
    def base(self) -> Card:
        """The base's card."""
        return next(card for card in self.backend.cards() if card.parent is None)

    async def _answer(self, way: Way, asking: Asking, asked: ChatRequest | CompletionRequest) -> Response:
        record = way.record
        async with way.run(way.request.receive):
            weighed = await self.backend.weigh(asking)
            record.prompt_tokens, record.max_tokens = weighed.prompt_tokens, weighed.max_tokens
            record.choices = weighed.choices
            way.enter()
            if not asked.stream:
                body = await self.backend.answer(asking)
                way.told(body)
                way.ended(None)
                return JSONResponse(body, headers=way.headers())
            chunks = await self.backend.stream(asking)
        counted = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        return EventStream(Watched(chunks, way, counted), way.run, way.ended, way.headers())

    async def drain(self, grace_seconds: float) -> None:
        """Nothing new is taken; what runs may end in this time, and what does not is told that it has to."""
        self.draining = True
        try:
            async with asyncio.timeout(grace_seconds):
                while self.running:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            self.cut()

    def cut(self) -> None:
        """What runs ends here, and is told why."""
        self.draining = True
        for run in list(self.running):
            run.end(ApiError(503, "the server went down before the answer had ended", code="shutting_down"))
