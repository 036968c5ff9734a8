"""Around the whole app: what no request may do, whoever asks, and what every answer has.

A body may not be too long or too slow. An answer is OpenAI's error where there was a fault, never a traceback. What a
connection may do before there is a request stands in `connections.py`.
"""

import asyncio
import logging
import re
from collections.abc import Iterable, MutableMapping
from ipaddress import ip_address
from secrets import token_hex
from time import monotonic
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from topwork.serving.config import LimitsConfig
from topwork.serving.errors import ApiError
from topwork.serving.streams import FAILED, ClientGone

log = logging.getLogger("topwork.serving")
access = logging.getLogger("topwork.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "x-frame-options": "DENY"}


class Guard:
    """The outermost of the app."""

    def __init__(self, app: ASGIApp, limits: LimitsConfig, hosts: Iterable[str] | None = None) -> None:
        """`hosts`: what requests may call this server (the Host header); None is anything."""
        self.app, self.limits = app, limits
        self.hosts = None if hosts is None else {host.lower() for host in hosts}
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(scope, send)
        self.inside += 1
        try:
            self._check(Headers(scope=scope))
            await self.app(scope, _Body(receive, self.limits, scope).receive, answer.send)
        except ClientGone:
            answer.status = answer.status or 499
        except ApiError as error:
            await answer.refuse(error)
        except Exception:
            log.exception("a request failed")
            await answer.refuse(ApiError(500, FAILED, code="internal_error"))
        finally:
            self.inside -= 1
            answer.tell()

    def _check(self, headers: Headers) -> None:
        if self.inside > self.limits.connections:
            raise ApiError(503, "too many requests at once; ask again in a moment", code="overloaded", retry_after=1)
        if self.hosts is not None and not self._is_ours(headers.get("host", "")):
            raise ApiError(
                421, "this server listens to its own machine alone and is not known by that host name; name it in "
                "allowed_hosts where a proxy stands before it", code="unknown_host",
            )  # fmt: skip
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self.limits.body_bytes:
            raise too_long(self.limits)

    def _is_ours(self, host: str) -> bool:
        """A name that some web page has pointed at this machine is none of ours: browsers would let it ask."""
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        name = name.strip("[]").lower()
        try:
            ip_address(name)
        except ValueError:
            return name in ("localhost", *(self.hosts or ()))
        return True


class _Body:
    """Counts what comes, and how long it takes."""

    def __init__(self, receive: Receive, limits: LimitsConfig, scope: Scope) -> None:
        self._receive, self._limits, self._scope = receive, limits, scope
        self._bytes, self._whole = 0, False
        self._until = monotonic() + limits.body_seconds

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(self._until - monotonic()):
                message = await self._receive()
        except TimeoutError:
            told = f"the body did not arrive within {self._limits.body_seconds:g} seconds"
            raise ApiError(408, told, code="slow_body") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        self._bytes += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._bytes > self._limits.body_bytes:
            raise too_long(self._limits)
        return message


class _Answer:
    """What goes out: with the headers that all have, and told in one line at its end."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        given = Headers(scope=scope).get("x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else token_hex(12)
        scope.setdefault("state", {})["request_id"] = self.id
        self.status = 0
        self._began = monotonic()
        self._ended = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(raw=list(message.get("headers", ())))
            for name, value in {**_HEADERS, "x-request-id": self.id}.items():
                headers.setdefault(name, value)
            headers.setdefault("cache-control", "no-store")
            message = {**message, "headers": headers.raw}
        self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def refuse(self, error: ApiError) -> None:
        """In the answer's place, where it has not begun; else there is nothing left to tell it with."""
        if not self.status:
            await as_response(error)(self._scope, _nothing, self.send)
        elif not self._ended:
            log.error("an answer was broken off: %s", error.message)

    def tell(self) -> None:
        """The line."""
        access.info(
            "%s %s %d %.3f s", self._scope["method"], self._scope["path"][:120].encode("unicode_escape").decode(),
            self.status, monotonic() - self._began,
            extra={"request_id": self.id, "seconds": round(monotonic() - self._began, 4), "status": self.status},
        )  # fmt: skip


def as_response(error: ApiError) -> JSONResponse:
    """An error as OpenAI's clients read it."""
    close = {"connection": "close"} if error.status in (408, 413) else {}  # what is left of the body is not waited for
    return JSONResponse(error.body(), error.status, {**error.headers(), **close})


def too_long(limits: LimitsConfig) -> ApiError:
    """413."""
    return ApiError(413, f"the body is longer than {limits.body_bytes} bytes", code="body_too_large")


async def _nothing() -> MutableMapping[str, Any]:
    return {"type": "http.disconnect"}
