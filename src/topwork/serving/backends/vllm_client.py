"""Asking a vLLM: OpenAI's endpoints and its own, on the event loop. (httpx is in the extra `serve`.)"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

from topwork.common.errors import RequestError, shortened
from topwork.serving.backends.backend import Refused

try:
    import httpx
except ImportError as error:
    raise RequestError("vLLM is asked through httpx, which is not installed: pip install 'topwork[serve]'") from error

LONGEST_ERROR = 64 * 1024
MESSAGE_CHARACTERS = 600
CONNECT_SECONDS = 10.0
DONE = "[DONE]"

Hide = Callable[[str], str]
"""Takes out of a message what clients are not to see."""


class VllmClient:
    """One vLLM. Raises Refused for what it refuses, and where it is not there."""

    def __init__(self, url: str, key: str | None = None, transport: Any = None) -> None:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)  # how long an answer may take is the app's to say
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=timeout, limits=limits, transport=transport, trust_env=False
        )

    async def close(self) -> None:
        """No more is asked."""
        await self._client.aclose()

    async def healthy(self, seconds: float = 5.0) -> bool:
        """Whether it says so within that time."""
        try:
            response = await self._client.get("/health", timeout=seconds)
        except httpx.HTTPError:
            return False
        return response.status_code == 200

    async def get(self, path: str) -> httpx.Response:
        """Any page."""
        with reaching():
            response = await self._client.get(path)
            if response.status_code != 200:
                raise refused(response.status_code, response.content, str)
            return response

    async def post(self, path: str, body: Mapping[str, Any], hide: Hide = str) -> httpx.Response:
        """A body, and the whole answer to it. Cancelled, the connection is closed, and vLLM ends the request."""
        with reaching():
            response = await self._client.post(path, content=_encoded(body), headers=_JSON)
            if response.status_code != 200:
                raise refused(response.status_code, response.content, hide)
            return response

    async def events(self, path: str, body: Mapping[str, Any], hide: Hide = str) -> "Events":
        """A body, and an answer that comes piece by piece; returns once the answer has a head."""
        with reaching():
            request = self._client.build_request("POST", path, content=_encoded(body), headers=_JSON)
            response = await self._client.send(request, stream=True)
            if response.status_code == 200:
                return Events(response, hide)
            try:
                told = b""
                async for piece in response.aiter_bytes():
                    told += piece
                    if len(told) > LONGEST_ERROR:
                        break
            finally:
                await response.aclose()
            raise refused(response.status_code, told, hide)


class Events:
    """The objects of a stream of server-sent events, to its `[DONE]`."""

    def __init__(self, response: httpx.Response, hide: Hide) -> None:
        self._response, self._hide = response, hide
        self._lines = response.aiter_lines()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        with reaching():
            text = await self._next()
        if text == DONE:
            raise StopAsyncIteration
        event = _object(text)
        if "error" in event:
            raise refused(_status(event["error"]), text.encode(), self._hide)
        return event

    async def _next(self) -> str:
        async for line in self._lines:
            if line.startswith("data:"):
                return line[5:].strip()
        raise _lost("vLLM ended in the middle of an answer")

    async def aclose(self) -> None:
        """Nobody reads on: the connection is closed, and vLLM ends the request."""
        await self._response.aclose()


_JSON = {"content-type": "application/json"}


def _encoded(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, allow_nan=False).encode("ascii")


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _lost("vLLM said what is no JSON object")
    return value


def _status(error: Any) -> int:
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def refused(status: int, body: bytes, hide: Hide) -> Refused:
    """vLLM's refusal as ours. What it says of itself (a key of ours that it refuses, its own failure) is no client's
    fault."""
    if status in (401, 403):
        told = "vLLM refuses the key that this server has for it"
        return Refused(502, told, "server_error", code="engine_refuses_key")
    if status >= 500:
        return Refused(502, "vLLM failed at this request", "server_error", code="engine_failed")
    try:
        error = json.loads(body)["error"]
        message, param = error["message"], error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        message, param = None, None
    if not isinstance(message, str):
        message = f"vLLM answered with status {status}"
    return Refused(
        status, shortened(hide(message), MESSAGE_CHARACTERS), _KINDS.get(status, "invalid_request_error"),
        param if isinstance(param, str) else None, "model_not_found" if status == 404 else None,
    )  # fmt: skip


_KINDS = {404: "not_found_error", 429: "rate_limit_error"}


def _lost(told: str) -> Refused:
    return Refused(502, told, "server_error", code="engine_lost")


@contextmanager
def reaching() -> Iterator[None]:
    """What goes wrong on the way, as Refused."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        told = "vLLM cannot be reached just now; try again in a moment"
        raise Refused(
            503, told, "service_unavailable_error", code="engine_unreachable", retry_after_seconds=2
        ) from error
    except httpx.HTTPError as error:
        raise _lost("the connection to vLLM broke") from error
