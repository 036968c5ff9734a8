"""What a tenant may use a minute, and at once: token buckets over a clock that never goes back.

A bucket holds a minute's worth and fills evenly. A request enters while each bucket holds at least one; it takes one
request and its prompt's tokens then, and its answer's tokens when it ends: what is charged is what was used, nothing is
reserved for `max_tokens` that never come. So a bucket of tokens may go below zero, by what ran when it was last above,
and who has drawn it down so far waits the longer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from time import monotonic

from topwork.serving.config import TenantConfig
from topwork.serving.errors import ApiError

MINUTE = 60.0
_ROUNDING = 1e-6
"""Of a request or token: what filling for the told time may fall short by."""


class LimitReached(ApiError):
    """429: which limit, when to try again, and what is left of all."""

    def __init__(self, message: str, kind: str, seconds: float, told: dict[str, str]) -> None:
        super().__init__(429, message, code="rate_limit_exceeded", retry_after=seconds, type=kind)
        self.seconds, self.told = seconds, told

    def headers(self) -> dict[str, str]:
        """When it may be tried again, in seconds and in milliseconds, and the tenant's limits."""
        return {
            "retry-after": str(max(1, ceil(self.seconds - _ROUNDING))),
            "retry-after-ms": str(max(1, ceil(self.seconds * 1000 - _ROUNDING))),
            **self.told,
        }


@dataclass
class Bucket:
    """So many a minute. `now` is the clock's seconds; it is not to go back."""

    a_minute: int
    level: float = field(init=False)
    filled_at: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.level = float(self.a_minute)

    def fill(self, now: float) -> None:
        """What has come since the last time."""
        if self.filled_at is not None:
            came = max(0.0, now - self.filled_at) * self.a_minute / MINUTE
            self.level = min(float(self.a_minute), self.level + came)
        self.filled_at = now

    def seconds_until_one(self) -> float:
        """0 where it holds one."""
        lacks = 1.0 - self.level
        return lacks * MINUTE / self.a_minute if lacks > _ROUNDING else 0.0

    def seconds_until_full(self) -> float:
        """0 where nothing was taken."""
        return (self.a_minute - self.level) * MINUTE / self.a_minute

    def take(self, count: int) -> None:
        """Whether it holds so many or not."""
        self.level -= count

    @property
    def left(self) -> int:
        """Whole ones."""
        return max(0, int(self.level + _ROUNDING))


@dataclass
class Allowance:
    """What one tenant may still use."""

    config: TenantConfig
    clock: Callable[[], float] = monotonic
    running: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        asked = {"requests": self.config.requests_per_minute, "tokens": self.config.tokens_per_minute}
        self.buckets = {kind: Bucket(a_minute) for kind, a_minute in asked.items() if a_minute is not None}

    def enter(self, prompt_tokens: int) -> None:
        """Take a request, its prompt's tokens and a place. Raises LimitReached, and then nothing is taken."""
        self._fill()
        most = self.config.concurrent
        if most is not None and self.running >= most:
            told = f"{most} requests are answered already, the most at once; try again when one has ended"
            raise LimitReached(told, "concurrency", 1.0, self.headers())
        for kind, bucket in self.buckets.items():
            if seconds := bucket.seconds_until_one():
                told = f"the limit of {bucket.a_minute} {kind} a minute is reached; try again in {ceil(seconds)} s"
                raise LimitReached(told, kind, seconds, self.headers())
        self.running += 1
        self._charge("requests", 1)
        self._charge("tokens", prompt_tokens)

    def leave(self, tokens: int) -> None:
        """Give the place back, and pay for what was not paid at the entrance."""
        self._fill()
        self.running -= 1
        self._charge("tokens", tokens)

    def headers(self) -> dict[str, str]:
        """The limits, what is left of them and when they are whole again, as OpenAI calls them."""
        self._fill()
        told = {}
        for kind, bucket in self.buckets.items():
            told[f"x-ratelimit-limit-{kind}"] = str(bucket.a_minute)
            told[f"x-ratelimit-remaining-{kind}"] = str(bucket.left)
            told[f"x-ratelimit-reset-{kind}"] = spoken(bucket.seconds_until_full())
        return told

    def _fill(self) -> None:
        now = self.clock()
        for bucket in self.buckets.values():
            bucket.fill(now)

    def _charge(self, kind: str, count: int) -> None:
        if kind in self.buckets:
            self.buckets[kind].take(count)


def spoken(seconds: float) -> str:
    """A time as OpenAI's headers have it: 6m0s, 1.2s, 20ms."""
    milliseconds = ceil(max(0.0, seconds) * 1000 - _ROUNDING)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
