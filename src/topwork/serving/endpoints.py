"""The endpoints of routes, votes and figures, and the page."""

import asyncio
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from topwork.common.errors import quoted
from topwork.common.options import Options
from topwork.serving.arms import report
from topwork.serving.errors import ApiError
from topwork.serving.feedback import Feedback
from topwork.serving.figures import ArmFigures
from topwork.serving.metrics import CONTENT_TYPE, Metrics
from topwork.serving.reading import checked, read_json
from topwork.serving.routes import Route, Routes
from topwork.serving.schema import gives, takes
from topwork.serving.seams import Caller, Gate
from topwork.serving.tenants import Tenants
from topwork.serving.votes import Vote

PAGE = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Weights(Options):
    """What `PUT /v1/routes/NAME` takes."""

    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    """By arm; those that are not named keep theirs."""
    restart: bool = False
    """Figures begin anew, so that arms are compared by what they met side by side."""


@dataclass(frozen=True)
class Ways:
    """What the endpoints are about."""

    gate: Gate
    routes: Routes
    feedback: Feedback
    metrics: Metrics

    def caller(self, request: Request) -> Caller:
        """Raises ApiError (401)."""
        return self.gate.identify(request.headers)

    def admin(self, request: Request, what: str) -> Caller:
        """Raises ApiError: 401, and 403 for others than admins."""
        caller = self.caller(request)
        if not caller.admin:
            raise ApiError(403, f"{what} asks for an admin's key", code="admin_only")
        return caller

    def route(self, caller: Caller, name: str) -> Route:
        """One that this caller may see. Raises ApiError (404)."""
        if not self.gate.may_use(caller, name):
            raise ApiError(404, f"no route is called {quoted(name)}", code="route_not_found")
        return self.routes.get(name)

    async def told(self, route: Route) -> dict[str, Any]:
        """The figures as they are now; the intervals are computed beside the event loop."""
        figures = {arm: deepcopy(self.feedback.figures(route.name, arm)) for arm in route.weights}
        models = {arm.name: self.routes.adapter_of(arm) or self.feedback.base_name for arm in route.config.arms}
        pairs = {
            (one, other): self.feedback.preferences(models[one], models[other]) for one in models for other in models
        }
        return await asyncio.to_thread(_reported, route, figures, pairs)


def endpoints(ways: Ways) -> APIRouter:
    """GET /, /metrics, /v1/routes, /v1/routes/NAME, /v1/comparisons; PUT /v1/routes/NAME; POST /v1/feedback."""
    router = APIRouter()
    _add_routes(router, ways)
    _add_feedback(router, ways)
    _add_metrics(router, ways)
    _add_page(router)
    return router


def _add_routes(router: APIRouter, ways: Ways) -> None:
    @router.get("/v1/routes", tags=["routes"], **gives("application/json"))
    async def list_routes(request: Request) -> JSONResponse:
        """The routes that one may use; an admin sees their figures."""
        caller = ways.caller(request)
        seen = [ways.routes.get(name) for name in ways.routes.names() if ways.gate.may_use(caller, name)]
        data = [await ways.told(route) for route in seen] if caller.admin else [{"name": route.name} for route in seen]
        return JSONResponse({"object": "list", "data": data})

    @router.get("/v1/routes/{name}", tags=["routes"], **gives("application/json"))
    async def one_route(request: Request, name: str) -> JSONResponse:
        """What came of each arm, and what may be said of their differences. For admins."""
        route = ways.route(ways.caller(request), name)
        ways.admin(request, "what came of a route's arms")
        return JSONResponse(await ways.told(route))

    @router.put("/v1/routes/{name}", tags=["routes"], **takes(Weights, "application/json"))
    async def change_route(request: Request, name: str) -> JSONResponse:
        """Other weights from the next request on. For admins."""
        ways.route(ways.caller(request), name)
        ways.admin(request, "changing a route")
        asked = checked(Weights, await read_json(request))
        route = ways.routes.change(name, asked.weights, asked.restart)
        if asked.restart:
            ways.feedback.restart(name)
        return JSONResponse(await ways.told(route))


def _add_feedback(router: APIRouter, ways: Ways) -> None:
    @router.post("/v1/feedback", tags=["feedback"], **takes(Vote, "application/json"))
    async def vote(request: Request) -> JSONResponse:
        """A vote on an answer, or on two side by side. A second one on the same replaces the first."""
        caller = ways.caller(request)
        given = checked(Vote, await read_json(request))
        return JSONResponse(await ways.feedback.give(given, caller.name))

    @router.get("/v1/comparisons", tags=["feedback"], **gives("application/json"))
    async def comparisons(request: Request) -> JSONResponse:
        """What side-by-side votes came to, for each two models. For admins."""
        ways.admin(request, "what votes came to")
        pairs = {names: deepcopy(tally) for names, tally in ways.feedback.pairs.items()}
        data = await asyncio.to_thread(lambda: [tally.told(*names) for names, tally in sorted(pairs.items())])
        return JSONResponse({"object": "list", "data": data})


def _add_metrics(router: APIRouter, ways: Ways) -> None:
    @router.get("/metrics", tags=["server"], **gives("text/plain"))
    async def metrics(request: Request) -> Response:
        """For Prometheus. Where there are keys: an admin's, or one that may read metrics."""
        caller = ways.caller(request)
        if isinstance(ways.gate, Tenants) and not ways.gate.may_read_metrics(caller):
            raise ApiError(403, "/metrics asks for a key that may read it", code="metrics_only")
        text = await asyncio.to_thread(ways.metrics.exposition)  # long, where there are hundreds of adapters
        service = getattr(request.app.state, "service", None)
        own = await service.backend.metrics() if service is not None else ""  # the engine's, where it stands elsewhere
        return Response(text + own.encode(), headers={"content-type": CONTENT_TYPE})


def _add_page(router: APIRouter) -> None:
    content = {name: files("topwork.serving").joinpath("page", name).read_bytes() for name in PAGE}

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return _page("index.html")

    @router.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in PAGE:
            raise ApiError(404, f"the page has no {quoted(name)}")
        return _page(name)

    def _page(name: str) -> Response:
        return Response(content[name], headers={**_PAGE_HEADERS, "content-type": PAGE[name]})


def _reported(route: Route, figures: Mapping[str, ArmFigures], pairs: Mapping[tuple[str, str], Any]) -> dict[str, Any]:
    return report(route, figures, lambda one, other: pairs[one, other])
