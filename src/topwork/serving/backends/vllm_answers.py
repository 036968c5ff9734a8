"""A request on its way to vLLM and back, under the names that the client knows."""

from collections.abc import Callable, Mapping
from typing import Any, Self

from topwork.serving.backends.backend import Call
from topwork.serving.backends.vllm_client import Events


def body_for(call: Call, internal: str) -> dict[str, Any]:
    """The body as it was sent, for vLLM's name of the model; who shares cached prompts is ours to say."""
    body = {key: value for key, value in call.body.items() if key not in ("cache_salt", "stream_options")}
    salt = "/".join(str(part) for part in (call.salt, call.body.get("cache_salt")) if part)
    return body | {"model": internal, "stream": False} | ({"cache_salt": salt} if salt else {})


def shown(said: Mapping[str, Any], call: Call) -> dict[str, Any]:
    """What vLLM said, as the client's model and under the id that the app keeps."""
    own = getattr(call.parsed, "id", None)
    return dict(said) | {"model": call.shown} | ({} if own is None else {"id": own})


class ShownChunks:
    """vLLM's chunks as ours (`backend.Chunks`); `done` is called once, when the last has come or nobody reads on."""

    def __init__(self, events: Events, call: Call, done: Callable[[], None]) -> None:
        self._events, self._call, self._done = events, call, done
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        try:
            chunk = await anext(self._events)
        except BaseException:
            await self.aclose()
            raise
        count: Callable[[int], None] | None = getattr(self._call.parsed, "token", None)
        if count is not None:
            for choice in chunk.get("choices") or ():
                if _says_something(choice):
                    count(choice.get("index", 0))
        return shown(chunk, self._call)

    async def aclose(self) -> None:
        """The connection is closed, and vLLM ends the request."""
        if not self._over:
            self._over = True
            try:
                await self._events.aclose()
            finally:
                self._done()


def _says_something(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return any((choice.get("text"), delta.get("content"), delta.get("reasoning"), delta.get("tool_calls")))
