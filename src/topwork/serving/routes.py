"""Routes: names that stand for several adapters, dealt out by weight (A/B).

Who meets which arm is weighted rendezvous hashing: each arm draws -ln(u)/weight, u in (0, 1) being a hash of the
route's salt, of what sticks and of the arm's name, and the least draw answers. So arms meet exactly their weights'
shares in the limit, the same key always meets the same arm, on every server that has the same file, and a weight that
grows takes keys from the other arms and moves none between them.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from secrets import token_hex
from typing import Any

from topwork.common.errors import did_you_mean, quoted
from topwork.serving.config import ArmConfig, RouteConfig
from topwork.serving.errors import ApiError
from topwork.serving.seams import Caller, Target

BASE = "base"
"""An arm of this model is the base, where no adapter is called so."""


@dataclass
class Route:
    """A route as it stands: its weights may be changed while it serves.

    period   counts how often its figures began anew
    changed  how often weights were changed in this period
    """

    config: RouteConfig
    weights: dict[str, float]
    period: int = 0
    changed: int = 0

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.config.name

    def arm_of(self, key: str) -> ArmConfig:
        """The arm that this key meets."""
        salt = self.config.salt if self.config.salt is not None else self.name
        able = [arm for arm in self.config.arms if self.weights[arm.name] > 0]
        return min(able, key=lambda arm: -log(_between_0_and_1(salt, key, arm.name)) / self.weights[arm.name])

    def shares(self) -> dict[str, float]:
        """The part of the requests that each arm is to get."""
        total = sum(self.weights.values())
        return {name: weight / total for name, weight in self.weights.items()}


@dataclass
class Routes:
    """All routes: `seams.Router`.

    base_names  what the base is called, beside "base"
    saved       what `as_state` gave before the last end
    keep        told of `as_state` after each change; it may write it down
    fresh       a key for a request that has none
    """

    configs: Sequence[RouteConfig]
    base_names: Collection[str] = ()
    saved: Mapping[str, Any] = field(default_factory=dict)
    keep: Callable[[dict[str, Any]], None] = lambda _: None
    fresh: Callable[[], str] = lambda: token_hex(16)

    def __post_init__(self) -> None:
        self._routes = {config.name: _restored(config, self.saved.get(config.name)) for config in self.configs}
        if self.as_state() != self.saved:  # so that the next start knows these arms from others that the file may have
            self.keep(self.as_state())

    def names(self) -> list[str]:
        """The routes' names, as in the file."""
        return list(self._routes)

    def get(self, name: str) -> Route:
        """Raises ApiError (404) where no route is called so."""
        if name not in self._routes:
            raise ApiError(404, f"no route is called {quoted(name)}", code="route_not_found")
        return self._routes[name]

    def resolve(self, model: str, caller: Caller, user: str | None, headers: Mapping[str, str]) -> Target | None:
        """The arm that answers; None where no route is called so."""
        route = self._routes.get(model)
        if route is None:
            return None
        sticks = _what_sticks(route.config.sticky, caller, user, headers)
        arm = route.arm_of(self.fresh() if sticks is None else sticks)
        return Target(self.adapter_of(arm), route.name, arm.name)

    def adapter_of(self, arm: ArmConfig) -> str | None:
        """The adapter that answers for an arm; None for the base."""
        return None if arm.model is None or arm.model in self._base_names else arm.model

    def missing(self, adapters: Collection[str]) -> list[str]:
        """What is wrong with arms whose adapters are not among these."""
        return [
            f"arm {arm.name!r} of route {route.name!r}: no adapter is called {adapter!r}"
            f"{did_you_mean(adapter, adapters)}"
            for route in self._routes.values()
            for arm in route.config.arms
            if (adapter := self.adapter_of(arm)) is not None and adapter not in adapters
        ]

    def change(self, name: str, weights: Mapping[str, float], restart: bool = False) -> Route:
        """Other weights from the next request on, for the arms that are named. With `restart` figures begin anew: arms
        that had other shares at other times met other requests. Raises ApiError for an unknown route or arm, and where
        all weights would be 0."""
        route = self.get(name)
        if unknown := [arm for arm in weights if arm not in route.weights]:
            raise ApiError(400, f"route {quoted(name)} has no arm {quoted(unknown[0])}", "weights", "arm_not_found")
        asked = {**route.weights, **weights}
        if not any(asked.values()):
            raise ApiError(400, "all weights would be 0; somebody has to answer", "weights")
        changed = 0 if restart else route.changed + (asked != route.weights)
        self._routes[name] = Route(route.config, asked, route.period + restart, changed)
        self.keep(self.as_state())
        return self._routes[name]

    def as_state(self) -> dict[str, Any]:
        """What a next start has to know, as JSON."""
        return {
            route.name: {
                "of": _identity(route.config),
                "weights": route.weights,
                "period": route.period,
                "changed": route.changed,
            }
            for route in self._routes.values()
        }

    @property
    def _base_names(self) -> set[str]:
        return {BASE, *self.base_names}


def _restored(config: RouteConfig, saved: Mapping[str, Any] | None) -> Route:
    """A route as it was left, unless its arms were changed in the file since: then the file is right. Its periods go on
    counting, so that new figures are not mixed with old ones."""
    fresh = {arm.name: arm.weight for arm in config.arms}
    if saved is None:
        return Route(config, fresh)
    if saved.get("of") != _identity(config):
        return Route(config, fresh, int(saved.get("period", 0)) + 1)
    return Route(config, dict(saved["weights"]), int(saved["period"]), int(saved["changed"]))


def _identity(config: RouteConfig) -> str:
    """Other for other arms, weights or salt."""
    return hashlib.sha256(config.model_dump_json(include={"arms", "salt"}).encode()).hexdigest()[:16]


def _what_sticks(sticky: str, caller: Caller, user: str | None, headers: Mapping[str, str]) -> str | None:
    """The key that decides about the arm; one tenant's users are not another's."""
    if sticky == "none":
        return None
    if sticky == "key":
        return caller.name or None
    found = user if sticky == "user" else headers.get(sticky.partition(":")[2].lower())
    return f"{caller.name}/{found}" if found else None


def _between_0_and_1(salt: str, key: str, arm: str) -> float:
    """Never 0 or 1; of 2^53 places, so that no float is rounded to an end."""
    digest = hashlib.blake2b(json.dumps([salt, key, arm]).encode(), digest_size=8).digest()
    return ((int.from_bytes(digest) >> 11) + 0.5) / 2**53
