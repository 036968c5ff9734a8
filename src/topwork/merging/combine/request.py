"""From what was asked for to `Settings`, or a RequestError that names what is wrong. Free of torch's work."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from topwork.common.errors import RequestError, did_you_mean
from topwork.merging.combine.settings import TIES_WEIGHTS, Settings
from topwork.merging.combine.table import WAYS, Way, way_of

FLAGS = {
    "density": "--density", "ties_weights": "--ties-weights", "scale": "--lambda", "epsilon": "--epsilon",
    "gamma": "--gamma", "seed": "--seed",
}  # fmt: skip
"""As the command line calls what not all methods read."""


def settings_for(
    method: str,
    labels: Sequence[str],
    weights: Sequence[float] | None = None,
    density: Sequence[float] | None = None,
    rank: int | None = None,
    ties_weights: str | None = None,
    scale: float | None = None,
    epsilon: float | None = None,
    gamma: float | None = None,
    seed: int | None = None,
) -> Settings:
    """`labels` are what the sources are called. Without weights each is 1; one density stands for all sources; the rest
    have the defaults of `Settings`. Raises RequestError."""
    options: dict[str, Any] = {
        "ties_weights": ties_weights, "scale": scale, "epsilon": epsilon, "gamma": gamma, "seed": seed,
    }  # fmt: skip
    way, given = way_of(method), {name: value for name, value in options.items() if value is not None}
    _check_sources(way, labels)
    _refuse_unread(way, given | ({} if density is None else {"density": density}))
    weights = _for_each("--weights", weights, labels, 1.0)
    if not any(weights):
        raise RequestError("--weights are all zero, which leaves nothing; give one that is not")
    if way.check is not None:
        way.check(weights)
    if density is not None and len(density) == 1:
        density = [*density] * len(labels)
    shares = _for_each("--density", density, labels, way.density)
    _check_values(given, shares)
    if rank is not None and rank < 1:
        raise RequestError(f"--rank {rank}: a rank is 1 or more")
    return Settings(method, weights, shares, rank=rank, **given)


def told(settings: Settings) -> Mapping[str, Any]:
    """The settings that the method reads, for its record."""
    return {name: getattr(settings, name) for name in way_of(settings.method).reads}


def _check_sources(way: Way, labels: Sequence[str]) -> None:
    if not labels:
        raise RequestError("no adapter was given; name one or more, and OUT last: topwork combine A B OUT")
    if way.sources is not None and len(labels) != way.sources:
        raise RequestError(
            f"--method {way.name} goes between {way.sources} adapters, and {len(labels)} were given; take linear or "
            "task-arithmetic for another number"
        )


def _refuse_unread(way: Way, given: Mapping[str, Any]) -> None:
    unread = [name for name in given if name not in way.reads]
    if unread:
        readers = [other.name for other in WAYS.values() if unread[0] in other.reads]
        raise RequestError(
            f"{FLAGS[unread[0]]} says nothing to --method {way.name}; leave it out, or take one that reads it: "
            f"{', '.join(readers)}"
        )


def _for_each(
    flag: str, values: Sequence[float] | None, labels: Sequence[str], default: float
) -> tuple[float, ...]:  # fmt: skip
    if values is None:
        return (default,) * len(labels)
    if len(values) != len(labels):
        raise RequestError(
            f"{flag} gives {len(values)} numbers for {len(labels)} adapters ({', '.join(labels)}); give one for each"
        )
    if not all(math.isfinite(value) for value in values):
        raise RequestError(f"{flag} {','.join(map(str, values))}: every number has to be finite")
    return tuple(float(value) for value in values)


def _check_values(given: Mapping[str, Any], density: Sequence[float]) -> None:
    outside = [share for share in density if not 0 < share <= 1]
    if outside:
        raise RequestError(
            f"--density {outside[0]:g}: the share of a source's values that is kept lies over 0 and at most at 1 "
            "(0.2 keeps a fifth)"
        )
    kind = given.get("ties_weights")
    if kind is not None and kind not in TIES_WEIGHTS:
        raise RequestError(
            f"--ties-weights {kind}: expected {' or '.join(TIES_WEIGHTS)}{did_you_mean(kind, TIES_WEIGHTS)}"
        )
    for name in ("scale", "epsilon", "gamma"):
        if name in given and not math.isfinite(given[name]):
            raise RequestError(f"{FLAGS[name]} {given[name]} is not finite")
    for name in ("epsilon", "gamma"):
        if name in given and not 0 <= given[name] < 1:
            raise RequestError(f"{FLAGS[name]} {given[name]:g}: expected a share from 0 to under 1")
