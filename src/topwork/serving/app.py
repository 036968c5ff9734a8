"""The app: endpoints, the faults that they answer with, and the guard around them."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import topwork
from topwork.common.errors import quoted
from topwork.serving.backends.backend import Refused
from topwork.serving.calls import GONE, as_api_error
from topwork.serving.config import of_this_machine
from topwork.serving.errors import ApiError
from topwork.serving.guards import Guard, as_response
from topwork.serving.models import models
from topwork.serving.openai import ChatRequest, CompletionRequest
from topwork.serving.schema import described, takes
from topwork.serving.service import Service
from topwork.serving.streams import FAILED, ClientGone


def create_app(service: Service) -> Guard:
    """The whole app over a service whose back end was started."""
    app = FastAPI(
        title="Topwork", version=topwork.__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        summary="One frozen base, many adapters, one pass: OpenAI's API, and vLLM's to load adapters.",
    )  # fmt: skip
    app.state.service = service
    routers: list[APIRouter] = [answers(service), models(service), server(service), *service.parts.routers]
    for router in routers:
        app.include_router(router)
    _add_faults(app, [route for router in routers for route in router.routes if isinstance(route, APIRoute)])
    config = service.config
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST", "PUT"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "x-topwork-arm", "x-topwork-version", "retry-after"],
        )  # fmt: skip
    app.openapi = lambda: described(app)  # type: ignore[method-assign]
    closed = of_this_machine(config.host) and "*" not in config.allowed_hosts
    return Guard(app, config.limits, config.allowed_hosts if closed else None)


def answers(service: Service) -> APIRouter:
    """OpenAI's chat and completions."""
    router = APIRouter(tags=["answers"])

    @router.post("/v1/chat/completions", **takes(ChatRequest, "application/json", "text/event-stream"))
    async def chat_completions(request: Request) -> Response:
        """The next message of a conversation."""
        return await service.answer(request, "chat")

    @router.post("/v1/completions", **takes(CompletionRequest, "application/json", "text/event-stream"))
    async def completions(request: Request) -> Response:
        """How a text goes on."""
        return await service.answer(request, "completions")

    return router


def server(service: Service) -> APIRouter:
    """What tells how the server is. No key is asked for."""
    router = APIRouter(tags=["server"])

    @router.get("/health")
    async def health() -> JSONResponse:
        """Whether it is alive: 503 where only a new start helps."""
        found = service.backend.health()
        if not found.alive:
            raise ApiError(503, found.told or "the engine has ended; start the server anew", code="engine_stopped")
        return JSONResponse({"status": "ok"})

    @router.get("/ready")
    async def ready() -> JSONResponse:
        """Whether it takes requests: 503 while it does not."""
        found = service.backend.health()
        if service.draining or not (found.alive and found.ready):
            told = "going down" if service.draining else found.told or "not ready yet"
            raise ApiError(503, told, code="not_ready", retry_after=5)
        return JSONResponse({"status": "ready"})

    @router.get("/version")
    async def version() -> JSONResponse:
        """The package's."""
        return JSONResponse({"version": topwork.__version__})

    return router


def _add_faults(app: FastAPI, routes: Sequence[APIRoute]) -> None:
    """Whatever is raised is told as OpenAI's clients read it; `routes` are all that there are."""
    faults: dict[type[Exception], Callable[[Any], ApiError]] = {
        ApiError: lambda error: error,
        Refused: as_api_error,
        RequestValidationError: _invalid,
        Exception: lambda _: ApiError(500, FAILED, code="internal_error"),
    }

    def answering(as_error: Callable[[Any], ApiError]) -> Callable[[Request, Exception], Awaitable[Response]]:
        async def answer(_: Request, error: Exception) -> Response:
            return as_response(as_error(error))

        return answer

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code != 405:
            return as_response(_http(error))
        path = request.scope["path"]
        allowed = ", ".join(
            sorted({way for route in routes if route.path_regex.match(path) for way in route.methods or ()})
        )
        told = f"this path does not take that method; it takes {allowed or 'GET'}"
        response = as_response(ApiError(405, told, code="method_not_allowed"))
        response.headers["allow"] = allowed or "GET"
        return response

    for kind, as_error in faults.items():
        app.add_exception_handler(kind, answering(as_error))
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientGone, _unheard)


async def _unheard(_: Request, __: Exception) -> Response:
    return Response(status_code=GONE)


def _invalid(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])[:128]
    return ApiError(400, f"{place or 'the request'}: {first['msg']}", place or None)


def _http(error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, "there is nothing at this path; /openapi.json tells what there is", code="not_found")
    return ApiError(error.status_code, quoted(error.detail).strip("'"))
