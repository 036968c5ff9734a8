"""What came of an arm and of votes on two answers, in bounded memory."""

from dataclasses import dataclass, field
from math import exp, floor, log
from typing import Any

from topwork.serving.comparison import Moments, always_valid, mean_interval, wilson
from topwork.serving.seams import Call

_STEP = log(1.02)
MOST_VERSIONS = 32
GONE = 499
"""The status of a call whose client did not wait."""

_TURNED = {"first": "second", "second": "first", "both_good": "both_good", "both_bad": "both_bad"}
NOTHING_YET = "no difference can be told yet"


@dataclass
class Times:
    """Seconds: their moments, and quantiles to 1 % out of counts of classes that are 2 % wide."""

    moments: Moments = field(default_factory=Moments)
    classes: dict[int, int] = field(default_factory=dict)

    def add(self, seconds: float) -> None:
        """A time more. There are some 1,500 classes between a nanosecond and a month."""
        self.moments.add(seconds)
        at = floor(log(max(seconds, 1e-9)) / _STEP)
        self.classes[at] = self.classes.get(at, 0) + 1

    def quantile(self, part: float) -> float | None:
        """The least time that at least this part of them does not exceed; None where there are none."""
        wanted, seen = part * self.moments.count, 0
        for at in sorted(self.classes):
            seen += self.classes[at]
            if seen >= wanted:
                return exp((at + 0.5) * _STEP)
        return None

    def told(self) -> dict[str, float | None]:
        """Mean, median and the time that one in twenty exceeds."""
        return {"mean": self.moments.mean, "p50": self.quantile(0.5), "p95": self.quantile(0.95)}


@dataclass
class ArmFigures:
    """An arm's. `requests` are those that reached the engine and were answered, gave up (`cancelled`) or failed there
    (`errors`); what was refused is none."""

    requests: int = 0
    errors: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first_token: Times = field(default_factory=Times)
    total: Times = field(default_factory=Times)
    votes: Moments = field(default_factory=Moments)
    scores: Moments = field(default_factory=Moments)
    versions: set[str] = field(default_factory=set)

    def count(self, call: Call) -> None:
        """A call that has ended."""
        if 400 <= call.status < GONE:
            return
        self.requests += 1
        failed, cancelled = call.status > GONE, call.status == GONE
        self.errors += failed
        self.cancelled += cancelled
        self.prompt_tokens += call.prompt_tokens
        self.generated_tokens += call.generated_tokens
        if call.first_token_at is not None:
            self.first_token.add(call.first_token_at - call.arrived_at)
        if call.ended_at is not None and not failed and not cancelled:
            self.total.add(call.ended_at - call.arrived_at)
        if len(self.versions) < MOST_VERSIONS:
            self.versions.add(call.version)

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "requests": self.requests,
            "errors": self.errors,
            "cancelled": self.cancelled,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "time_to_first_token_seconds": self.first_token.told(),
            "total_seconds": self.total.told(),
            "versions": sorted(self.versions),
            "votes": {
                "count": self.votes.count,
                "share_up": self.votes.mean,
                "interval": wilson(self.votes.total, self.votes.count),
                "always_valid": always_valid(self.votes.total, self.votes.count),
            },
            "scores": {
                "count": self.scores.count,
                "mean": self.scores.mean,
                "interval": mean_interval(self.scores),
                "always_valid": always_valid(self.scores.total, self.scores.count),
            },
        }


@dataclass
class Preferences:
    """Votes on two answers to one question."""

    first: int = 0
    second: int = 0
    both_good: int = 0
    both_bad: int = 0

    def add(self, outcome: str, times: int, turned: bool) -> None:
        """A vote more, or with times=-1 one that is taken back; `turned` where its first is second here. Raises
        KeyError for an outcome that there is not."""
        name = _TURNED[outcome] if turned else _TURNED[_TURNED[outcome]]
        setattr(self, name, getattr(self, name) + times)

    def turned(self) -> "Preferences":
        """With the two the other way round."""
        return Preferences(self.second, self.first, self.both_good, self.both_bad)

    def told(self, first: str, second: str) -> dict[str, Any]:
        """As JSON; ties say nothing of who is preferred, so the share is of the others."""
        decided = self.first + self.second
        always = always_valid(self.second, decided)
        told = NOTHING_YET
        if always[0] > 0.5:
            told = f"{second} is preferred to {first} in more than half of the decided votes"
        elif always[1] < 0.5:
            told = f"{first} is preferred to {second} in more than half of the decided votes"
        return {
            "first": first,
            "second": second,
            "first_preferred": self.first,
            "second_preferred": self.second,
            "both_good": self.both_good,
            "both_bad": self.both_bad,
            "share_second": self.second / decided if decided else None,
            "interval": wilson(self.second, decided),
            "always_valid": always,
            "told": told,
        }
