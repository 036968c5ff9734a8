"""Who answers: this machine's engine, or a vLLM that stands behind us. What the app asks of either.

The app has done its own part before it asks: keys, limits, routes, the body's checks. What it hands over is the JSON
body as OpenAI's clients send it, with the name of the adapter (or the base) that was chosen; what comes back are
OpenAI's objects. Everything here runs on the event loop and never blocks it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from topwork.common.errors import TopworkError

Endpoint = Literal["chat/completions", "completions"]


@dataclass(frozen=True)
class Call:
    """One request.

    body    the JSON object that was sent, checked by the app; its `model` is not looked at
    model   the public name that is to answer: the base's, or an adapter's (a route's arm, already chosen)
    shown   what `model` says in the answer: what the client asked for
    salt    calls of different salts share no cached prompts (a tenant's own)
    share   whose turn it is where several wait (a tenant)
    parsed  the app's own reading of the body, for a back end that was written beside it
    """

    endpoint: Endpoint
    body: Mapping[str, Any]
    model: str
    shown: str
    salt: str = ""
    share: str = ""
    parsed: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Card:
    """One model that can be asked for: the base (`parent` None) or an adapter on it.

    root     a label of where it is from, never a path of this machine
    content  the hash of what the adapter is; empty for the base
    """

    id: str
    created: int
    root: str
    parent: str | None
    context_length: int
    content: str = ""


@dataclass(frozen=True)
class Health:
    """`ready`: requests are taken. `alive`: somebody who watches need not start us anew. `told`: why not."""

    alive: bool
    ready: bool
    told: str = ""


class Refused(TopworkError):
    """A request that gets no answer: HTTP's status, and what stands under `error` in OpenAI's shape. Nothing in it
    names a path, an internal name or another tenant."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, retry_after_seconds: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after_seconds = retry_after_seconds

    @property
    def error(self) -> dict[str, Any]:
        """What stands under `error`."""
        return {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}


@dataclass(frozen=True)
class Weighed:
    """What a request may cost: its prompts' tokens (0 where nobody here can tell), the most that may be generated over
    all choices, and how many these are."""

    prompt_tokens: int
    max_tokens: int
    choices: int = 1


class Chunks(Protocol):
    """OpenAI's chunks in order, without `[DONE]`. The last has `choices: []` and `usage`, whether or not the client
    asked for it (the app counts by it, and leaves it out for those who have not asked)."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> dict[str, Any]: ...

    async def aclose(self) -> None:
        """Ends the request, begun or not; what it holds is free within a step."""
        ...


class Backend(Protocol):
    """Raises Refused wherever a request gets no answer; any other error is a fault of ours (500)."""

    async def start(self) -> None:
        """Until requests can be taken. RunError where that will not be."""
        ...

    async def stop(self, grace_seconds: float) -> None:
        """What runs may end; what has not in that time is cut. Nothing new is taken."""
        ...

    def cards(self) -> Sequence[Card]:
        """The base first, then adapters by name."""
        ...

    async def weigh(self, call: Call) -> Weighed:
        """Before limits are asked: what is wrong with the request by itself is told here."""
        ...

    async def answer(self, call: Call) -> dict[str, Any]:
        """The whole answer, `usage` in it. A task that is cancelled ends the request too."""
        ...

    async def stream(self, call: Call) -> Chunks:
        """Returns once it is sure that there will be an answer, so that what is wrong has a status of its own; a
        failure after that is raised while iterating."""
        ...

    async def load(
        self, name: str, folder: Path, replace: bool = False, pinned: bool = False, content: str | None = None
    ) -> Card:
        """Take an adapter from a folder that the app has allowed, under a public name. Requests that were admitted
        before go on with what the name stood for then. With `content`, nothing else than that is taken
        (ChangedAdapterError)."""
        ...

    async def unload(self, name: str) -> None:
        """The name is gone at once (404); what it stood for, when its last request has ended."""
        ...

    def health(self) -> Health: ...

    async def metrics(self) -> str:
        """In Prometheus' text form, what the engine itself counts."""
        ...
