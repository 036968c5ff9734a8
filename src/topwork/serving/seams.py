"""Where who may ask, who answers and what is counted are put into the server: three protocols, and the least of each.

A request goes: `Gate.identify` (its key) · `Router.resolve` (its model) · `Gate.may_use` · tokens are counted ·
`Gate.enter` (its limits) · `Meter.began` · the engine · `Meter.token` … · `Meter.ended` · `Gate.leave`.
All of it runs on the event loop's thread; nothing here may wait.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Caller:
    """Who asks.

    name   the tenant's, told in logs and metrics; empty where there are no keys
    admin  may load and unload adapters, and see all
    salt   callers of different salts share no cached prompts
    share  whose turn it is: callers of one share stand in one line
    """

    name: str = ""
    admin: bool = False
    salt: str = ""
    share: str = ""


@dataclass(frozen=True)
class Target:
    """Who answers a request: an adapter's public name, None for the base; and by which arm of which route."""

    adapter: str | None
    route: str | None = None
    arm: str | None = None


@dataclass
class Call:
    """One request on its way, and what came of it. Times are `time.monotonic()`; None is not yet.

    id          the answer's: chatcmpl-…, cmpl-… (feedback names it)
    endpoint    chat or completions
    model       as the request gave it
    version     the short content hash of the adapter that answers; empty for the base
    max_tokens  the most that may be generated, over all choices
    started_at  when the engine began to read its prompt; None where nobody tells
    finish      of each choice: stop, length, tool_calls, cancelled, failed
    """

    id: str
    endpoint: str
    caller: Caller
    model: str
    target: Target
    user: str | None = None
    stream: bool = False
    choices: int = 1
    prompt_tokens: int = 0
    max_tokens: int = 0
    version: str = ""
    arrived_at: float = 0.0
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    ended_at: float | None = None
    generated_tokens: int = 0
    cached_tokens: int = 0
    finish: list[str] = field(default_factory=list)
    status: int = 200
    error: str | None = None


class Gate(Protocol):
    """Keys, tenants and their limits. What it refuses it raises as an ApiError: 401, 403, 404, 429 with retry_after."""

    def identify(self, headers: Mapping[str, str]) -> Caller:
        """Who asks, by the request's headers (lower case)."""
        ...

    def may_use(self, caller: Caller, name: str) -> bool:
        """Whether the caller may use and see this model: an adapter's name, the base's, a route's. What it may not use
        is answered as if it were not there."""
        ...

    def enter(self, call: Call) -> None:
        """The call begins: its tokens are known, nothing runs yet. Raises ApiError where a limit is reached; `leave` is
        not called then."""
        ...

    def leave(self, call: Call) -> None:
        """It has ended, however it did."""
        ...

    def headers(self, caller: Caller) -> Mapping[str, str]:
        """What its answers' heads say of its limits (x-ratelimit-…)."""
        ...


class Router(Protocol):
    """Names that stand for several adapters."""

    def names(self) -> Sequence[str]:
        """The routes' names."""
        ...

    def resolve(self, model: str, caller: Caller, user: str | None, headers: Mapping[str, str]) -> Target | None:
        """Who answers; None where no route is called so. `user` and `headers` are what an arm may stick to."""
        ...


class Meter(Protocol):
    """Figures: for /metrics, for arms, for the log."""

    def began(self, call: Call) -> None:
        """It is handed to the engine."""
        ...

    def token(self, call: Call, seconds: float) -> None:
        """A token of one of its choices came, so long after that choice's last (the first: after the call arrived)."""
        ...

    def ended(self, call: Call) -> None:
        """It has ended, however it did, or was refused after its model was known (`status`, `error`)."""
        ...

    def stepped(self, statistics: Any) -> None:
        """The engine's figures (EngineStatistics), now and then."""
        ...


class OpenGate:
    """No keys: everyone may all."""

    def identify(self, headers: Mapping[str, str]) -> Caller:  # noqa: ARG002
        return Caller(admin=True)

    def may_use(self, caller: Caller, name: str) -> bool:  # noqa: ARG002
        return True

    def enter(self, call: Call) -> None:
        pass

    def leave(self, call: Call) -> None:
        pass

    def headers(self, caller: Caller) -> Mapping[str, str]:  # noqa: ARG002
        return {}


class NoRoutes:
    """Every model is itself."""

    def names(self) -> Sequence[str]:
        return ()

    def resolve(self, model: str, caller: Caller, user: str | None, headers: Mapping[str, str]) -> Target | None:  # noqa: ARG002
        return None


class NoMeter:
    """Nothing is counted."""

    def began(self, call: Call) -> None:
        pass

    def token(self, call: Call, seconds: float) -> None:
        pass

    def ended(self, call: Call) -> None:
        pass

    def stepped(self, statistics: Any) -> None:
        pass


@dataclass(frozen=True)
class Parts:
    """What is put in. `routers` are FastAPI's, with endpoints of their own; `app.state.service` is theirs to use."""

    gate: Gate = field(default_factory=OpenGate)
    router: Router = field(default_factory=NoRoutes)
    meter: Meter = field(default_factory=NoMeter)
    routers: Sequence[Any] = ()
