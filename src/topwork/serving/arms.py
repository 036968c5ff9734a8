"""A route's arms side by side: what came of each, and what may be said of their differences."""

from collections.abc import Callable, Mapping
from typing import Any

from topwork.serving.comparison import LEVEL, Interval, Moments, always_valid_difference, newcombe, welch
from topwork.serving.figures import MOST_VERSIONS, NOTHING_YET, ArmFigures, Preferences, Times
from topwork.serving.routes import Route


def report(
    route: Route, figures: Mapping[str, ArmFigures], preferences: Callable[[str, str], Preferences | None]
) -> dict[str, Any]:
    """A route as JSON: its arms, and each other arm's difference from the first.

    figures      by arm
    preferences  of two arms, by their names: side-by-side votes on what answers for them
    """
    shares = route.shares()
    arms = [
        {"name": arm.name, "model": arm.model, "weight": route.weights[arm.name], "share": shares[arm.name]}
        | figures[arm.name].told()
        for arm in route.config.arms
    ]
    first, *others = [arm.name for arm in route.config.arms]
    level = 1 - (1 - LEVEL) / max(1, len(others))
    differences = []
    for name in others:
        entry = difference(first, name, figures[first], figures[name], level)
        votes = preferences(first, name)
        differences.append(entry | {"side_by_side": None if votes is None else votes.told(first, name)})
    return {
        "name": route.name,
        "sticky": route.config.sticky,
        "period": route.period,
        "arms": arms,
        "differences": differences,
        "notes": _notes(route, figures, level),
    }


def difference(first: str, other: str, one: ArmFigures, two: ArmFigures, level: float = LEVEL) -> dict[str, Any]:
    """Second minus first, of everything that is counted."""
    return {
        "arm": other,
        "against": first,
        "votes": _of_shares(first, other, one.votes, two.votes, level, "more of its answers are voted up"),
        "scores": _of_scores(first, other, one.scores, two.scores, level),
        "errors": _of_shares(first, other, _errors(one), _errors(two), level, "more of its requests fail"),
        "time_to_first_token_seconds": _of_times(one.first_token, two.first_token, level),
        "total_seconds": _of_times(one.total, two.total, level),
    }


def _of_shares(first: str, other: str, one: Moments, two: Moments, level: float, more: str) -> dict[str, Any]:
    look = newcombe(one.total, one.count, two.total, two.count, level)
    return _bounded(first, other, one, two, look, level, more)


def _of_scores(first: str, other: str, one: Moments, two: Moments, level: float) -> dict[str, Any]:
    return _bounded(first, other, one, two, welch(one, two, level), level, "its answers are scored higher")


def _bounded(
    first: str, other: str, one: Moments, two: Moments, look: Interval | None, level: float, more: str
) -> dict[str, Any]:
    always = always_valid_difference(one.total, one.count, two.total, two.count, level)
    told = NOTHING_YET
    if always[0] > 0:
        told = f"{other}: {more} than of {first}, by {always[0]:.3f} to {always[1]:.3f}"
    elif always[1] < 0:
        told = f"{first}: {more} than of {other}, by {-always[1]:.3f} to {-always[0]:.3f}"
    elif look is not None and not look[0] <= 0 <= look[1]:
        told += " (a single look at a moment fixed beforehand would have told one; looking again and again does not)"
    return {"difference": _minus(two, one), "interval": look, "always_valid": always, "level": level, "told": told}


def _of_times(one: Times, two: Times, level: float) -> dict[str, Any]:
    look = welch(one.moments, two.moments, level)
    apart = look is not None and not look[0] <= 0 <= look[1]
    told = "the interval excludes 0, if this is the only look" if apart else NOTHING_YET
    return {"difference": _minus(two.moments, one.moments), "interval": look, "level": level, "told": told}


def _errors(figures: ArmFigures) -> Moments:
    return Moments(figures.requests, figures.errors, figures.errors)


def _minus(one: Moments, other: Moments) -> float | None:
    return None if one.mean is None or other.mean is None else one.mean - other.mean


def _notes(route: Route, figures: Mapping[str, ArmFigures], level: float) -> list[str]:
    """What the figures do not say by themselves."""
    notes = [
        "`interval` is for one look at a moment fixed beforehand, `always_valid` holds however often it is looked at; "
        "`told` goes by the second where there is one",
        "requests, tokens and times are counted since the server started; feedback since the period began",
    ]
    if len(route.weights) > 2:
        notes.append(f"{len(route.weights) - 1} differences are looked at, so that each has the level {level:.4f}")
    if route.config.sticky != "none":
        notes.append("answers to one user count as independent of each other, which they are not quite")
    if route.changed:
        notes.append(
            f"weights were changed {route.changed} times in this period: arms met requests of different times, and a "
            'difference may be one of times; {"restart": true} beside the weights begins anew'
        )
    for name, arm in figures.items():
        if len(arm.versions) > 1:
            many = f"{len(arm.versions)}{' or more' if len(arm.versions) >= MOST_VERSIONS else ''}"
            notes.append(f"arm {name} was answered by {many} versions of its adapter, counted together")
    return notes
