"""A server with all parts but an engine: it answers what it was told to, and tells gate and meter as a real one."""

import asyncio
import itertools
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from topwork.serving.config import ServeConfig
from topwork.serving.errors import ApiError
from topwork.serving.parts import parts_of
from topwork.serving.seams import Call, Parts, Target

BASE = "tiny"


def config(**values: Any) -> ServeConfig:
    """A server's, of no base in particular."""
    return ServeConfig.model_validate({"model": {"model_name_or_path": BASE}, **values})


@dataclass
class Stage:
    """say(model, question) -> the words of the answer."""

    parts: Parts
    adapters: list[str]
    say: Callable[[str, str], list[str]] = lambda model, question: [f"{model} ", "says ", question]
    seconds_a_word: float = 0.0
    ids: Iterator[int] = field(default_factory=itertools.count)

    def app(self) -> FastAPI:
        """What answers."""
        app = FastAPI()
        app.add_exception_handler(ApiError, _refused)
        for router in self.parts.routers:
            app.include_router(router)
        app.get("/v1/models")(self.models)
        app.post("/v1/chat/completions")(self.chat)
        return app

    async def models(self, request: Request) -> JSONResponse:
        """What the caller may see."""
        caller = self.parts.gate.identify(request.headers)
        names = [BASE, *self.adapters, *self.parts.router.names()]
        data = [{"id": name, "object": "model"} for name in names if self.parts.gate.may_use(caller, name)]
        return JSONResponse({"object": "list", "data": data})

    async def chat(self, request: Request) -> Any:
        """An answer, in pieces where it is to be streamed."""
        call, words = await self.admitted(request)
        head = {} if call.target.arm is None else {"x-topwork-arm": call.target.arm}
        head |= self.parts.gate.headers(call.caller)
        if call.stream:
            return StreamingResponse(self.streamed(call, words), media_type="text/event-stream", headers=head)
        async for _ in self.streamed(call, words):
            pass
        choice = {"index": 0, "message": {"role": "assistant", "content": "".join(words)}, "finish_reason": "stop"}
        return JSONResponse({"id": call.id, "choices": [choice], "usage": _usage(call)}, headers=head)

    async def admitted(self, request: Request) -> tuple[Call, list[str]]:
        """As the way of a request is told in `seams`."""
        caller = self.parts.gate.identify(request.headers)
        body = await request.json()
        model, user = body["model"], body.get("user")
        target = self.parts.router.resolve(model, caller, user, request.headers)
        if target is None and model in (BASE, *self.adapters):
            target = Target(None if model == BASE else model)
        if target is None or not self.parts.gate.may_use(caller, model):
            raise ApiError(404, f"no model is called {model}", "model", "model_not_found")
        call = Call(
            f"chatcmpl-{next(self.ids)}", "chat", caller, model, target, user, bool(body.get("stream")),
            arrived_at=monotonic(), prompt_tokens=len(str(body["messages"][-1]["content"]).split()),
        )  # fmt: skip
        self.parts.gate.enter(call)
        self.parts.meter.began(call)
        return call, self.say(target.adapter or BASE, body["messages"][-1]["content"])

    async def streamed(self, call: Call, words: list[str]) -> AsyncIterator[str]:
        """Server-sent events."""
        head = {"id": call.id, "object": "chat.completion.chunk", "created": 0, "model": call.model}
        last = call.arrived_at
        try:
            yield _event(head, {"role": "assistant", "content": ""})
            for word in words:
                await asyncio.sleep(self.seconds_a_word)
                now = monotonic()
                call.first_token_at, call.last_token_at = call.first_token_at or now, now
                call.generated_tokens += 1
                self.parts.meter.token(call, now - last)
                last = now
                yield _event(head, {"content": word})
            yield _event(head, {}, "stop")
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': _usage(call)})}\n\ndata: [DONE]\n\n"
            call.finish.append("stop")
        except BaseException:
            call.finish.append("cancelled")
            raise
        finally:
            call.ended_at = monotonic()
            self.parts.meter.ended(call)
            self.parts.gate.leave(call)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Its address, while it serves from a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    ready = threading.Event()
    server_started = server.startup

    async def startup(sockets: Any = None) -> None:
        await server_started(sockets)
        ready.set()

    server.startup = startup
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(20)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def stage(adapters: list[str], say: Callable[[str, str], list[str]] | None = None, **values: Any) -> Stage:
    """A server's parts, as serve.yaml's values have them."""
    made = Stage(parts_of(config(**values), [BASE]), adapters)
    made.say = say or made.say
    return made


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


def _event(head: dict[str, Any], delta: dict[str, Any], finish: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"


def _usage(call: Call) -> dict[str, int]:
    return {"prompt_tokens": call.prompt_tokens, "completion_tokens": call.generated_tokens}
