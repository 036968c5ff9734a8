"""What a sweep's members say together: means over seeds with standard errors, and the rank from which more is no gain.

Reads sweep.json as it is, so it needs no run and no model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from topwork.reporting.readers import entries, number, section

RANK_AXES = ("r", "adapter.r")
"""What the axis of ranks is called, by the ready experiment and by a grid."""
DIVERGED = "diverged"


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds. `error` is its standard error; with one seed the binomial one of a share of `rows`
    graded rows; None where nothing tells it."""

    mean: float
    error: float | None
    count: int


@dataclass(frozen=True)
class Point:
    """Members that differ in the seed alone. Diverged ones are counted, and are in no mean."""

    name: str
    values: dict[str, Any]
    members: tuple[str, ...]
    diverged: int
    left: bool
    loss: Estimate | None
    accuracy: Estimate | None
    trained: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """The point of diminishing returns along the ranks, with the other axes held at `others`; `rank` is None where the
    rule cannot be applied, and `text` says why."""

    others: dict[str, Any]
    measure: str
    best: Any
    rank: Any
    text: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"sentence": self.sentence()}

    def sentence(self) -> str:
        """The text, with the other axes' values in front."""
        held = ", ".join(f"{label.rpartition('.')[2]} {value}" for label, value in self.others.items())
        return f"{held}: {self.text}" if held else self.text


def estimate(values: Sequence[float], rows: int | None = None) -> Estimate | None:
    """The mean with its standard error: s / sqrt(n) over seeds; of one share of `rows` rows sqrt(p (1 - p) / rows)."""
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) > 1:
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        return Estimate(mean, math.sqrt(variance / len(values)), len(values))
    error = math.sqrt(max(0.0, mean * (1 - mean)) / rows) if rows else None
    return Estimate(mean, error, 1)


def points(sweep: Mapping[str, Any]) -> list[Point]:
    """The sweep's points, in the order of its members."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for member in members(sweep):
        groups.setdefault(str(member.get("point")), []).append(member)
    return [_point(name, group) for name, group in groups.items()]


def members(sweep: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The sweep's members as sweep.json tells of them."""
    return [member for member in entries(sweep, "members") if isinstance(member, Mapping)]


def final_loss(member: Mapping[str, Any]) -> float | None:
    """The loss on the rows of `evaluation.data`; where validation's rows are asked, the loss over all of them."""
    scored, validated = number(member, "scores", "loss"), number(member, "result", "eval_loss_after")
    if scored is None or (member.get("on_validation") and validated is not None):
        return validated
    return scored


def diminishing_returns(sweep: Mapping[str, Any]) -> list[Verdict]:
    """A verdict for each combination of the other axes; none where the sweep has no axis of ranks."""
    axis = rank_axis(sweep)
    if axis is None:
        return []
    groups: dict[str, list[Point]] = {}
    for point in points(sweep):
        others = {label: value for label, value in point.values.items() if label != axis}
        groups.setdefault(repr(others), []).append(point)
    return [_verdict(group, axis) for group in groups.values() if len(group) > 1]


def rank_axis(sweep: Mapping[str, Any]) -> str | None:
    """The axis of ranks, where there is one."""
    return next((label for label in section(sweep, "axes") if label in RANK_AXES), None)


def _point(name: str, group: Sequence[Mapping[str, Any]]) -> Point:
    diverged = [member for member in group if member.get("state") == DIVERGED]
    sound = [member for member in group if member.get("state") != DIVERGED and not _left(member)]
    losses = [loss for member in sound if (loss := final_loss(member)) is not None]
    shares = [share for member in sound if (share := number(member, "scores", "exact_match")) is not None]
    rows = next((rows for member in sound if (rows := number(member, "scores", "rows"))), None)
    trained = next((count for member in group if (count := number(member, "result", "trained")) is not None), None)
    return Point(
        name,
        dict(section(group[0], "values")),
        tuple(str(member.get("name")) for member in group),
        len(diverged),
        all(_left(member) for member in group),
        estimate(losses),
        estimate(shares, int(rows) if rows else None),
        trained,
    )


def _left(member: Mapping[str, Any]) -> bool:
    """Whether halving took it out."""
    return member.get("left_at") is not None


def _verdict(group: Sequence[Point], axis: str) -> Verdict:
    others = {label: value for label, value in group[0].values.items() if label != axis}
    graded = any(point.accuracy is not None and point.accuracy.mean > 0 for point in group)  # all wrong tells nothing
    measure = "exact answers" if graded else "loss"
    found = [
        (point, measured)
        for point in group
        if (measured := point.accuracy if graded else point.loss) is not None and not point.diverged
    ]
    if not found:
        return Verdict(others, measure, None, None, "No rank has a result without a diverged member.")
    best, top = (max if graded else min)(found, key=lambda pair: pair[1].mean)
    rank = best.values[axis]
    if top.error is None:
        text = (
            f"The best {measure} is at r = {rank}. One seed and no graded answers tell no standard error, so no "
            "smaller rank can be called as good; repeat with --seeds 3."
        )
        return Verdict(others, measure, rank, None, text)
    reach = top.error + 1e-9 * abs(top.mean)  # shares of rows often lie exactly one error apart
    near = [point.values[axis] for point, measured in found if abs(measured.mean - top.mean) <= reach]
    smallest = min(near)
    shown = (lambda value: f"{100 * value:.1f} %") if graded else (lambda value: f"{value:.4f}")
    kind = f"over {top.count} seeds" if top.count > 1 else "binomial, of the graded rows, as there is one seed"
    text = (
        f"Diminishing returns from r = {smallest}: the smallest rank whose mean {measure} is within one standard error "
        f"of the best ({shown(top.mean)} ± {shown(top.error)} at r = {rank}; the error is {kind})."
    )
    return Verdict(others, measure, rank, smallest, text)
