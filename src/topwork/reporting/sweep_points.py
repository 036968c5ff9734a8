"""What a sweep's trials say together: means over seeds with standard errors, and from which rank on more is no gain."""

import math
from collections.abc import Sequence

from pydantic import JsonValue

from topwork.reporting.sweep_state import Estimate, Point, SweepState, TrialRecord, TrialState, Verdict

RANK_AXES = ("r", "adapter.r")
"""What the axis of ranks is called, by the ready experiment and by a grid."""


def estimate(values: Sequence[float], rows: int | None = None) -> Estimate | None:
    """The mean with its standard error: s / sqrt(n) over seeds; of one share of `rows` rows sqrt(p (1 - p) / rows)."""
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) > 1:
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        return Estimate(mean=mean, error=math.sqrt(variance / len(values)), count=len(values))
    error = math.sqrt(max(0.0, mean * (1 - mean)) / rows) if rows else None
    return Estimate(mean=mean, error=error, count=1)


def points(sweep: SweepState) -> list[Point]:
    """The sweep's points, in the order of its trials."""
    groups: dict[str, list[TrialRecord]] = {}
    for trial in sweep.trials:
        groups.setdefault(trial.point, []).append(trial)
    return [_point(name, group) for name, group in groups.items()]


def final_loss(trial: TrialRecord) -> float | None:
    """The loss on the rows of `evaluation.data`; where validation's rows are asked, the loss over all of them."""
    validated = trial.result.eval_loss_after if trial.result else None
    if trial.scores is None or (trial.on_validation and validated is not None):
        return validated
    return trial.scores.loss


def diminishing_returns(sweep: SweepState) -> list[Verdict]:
    """A verdict for each combination of the other axes; none where the sweep has no axis of ranks."""
    axis = next((label for label in sweep.axes if label in RANK_AXES), None)
    if axis is None:
        return []
    groups: dict[str, list[Point]] = {}
    for point in points(sweep):
        groups.setdefault(repr(_others(point, axis)), []).append(point)
    return [_verdict(group, axis) for group in groups.values() if len(group) > 1]


def _point(name: str, group: Sequence[TrialRecord]) -> Point:
    sound = [trial for trial in group if trial.state not in (TrialState.DIVERGED, TrialState.LEFT)]
    scored = [trial.scores for trial in sound if trial.scores]
    return Point(
        name=name,
        values=dict(group[0].values),
        names=[trial.name for trial in group],
        diverged=sum(trial.state is TrialState.DIVERGED for trial in group),
        left=all(trial.state is TrialState.LEFT for trial in group),
        loss=estimate([loss for trial in sound if (loss := final_loss(trial)) is not None]),
        accuracy=estimate(
            [scores.exact_match for scores in scored if scores.exact_match is not None],
            next((scores.rows for scores in scored), None),
        ),
        trained=next((trial.result.trained for trial in group if trial.result), None),
    )


def _others(point: Point, axis: str) -> dict[str, JsonValue]:
    return {label: value for label, value in point.values.items() if label != axis}


def _rank(point: Point, axis: str) -> float:
    rank = point.values[axis]
    assert isinstance(rank, int | float), f"{axis} takes numbers alone"
    return rank


def _verdict(group: Sequence[Point], axis: str) -> Verdict:
    others = _others(group[0], axis)
    graded = any(point.accuracy is not None and point.accuracy.mean > 0 for point in group)  # all wrong tells nothing
    measure = "exact answers" if graded else "loss"

    def verdict(text: str, best: float | None = None, smallest: float | None = None) -> Verdict:
        held = ", ".join(f"{label.rpartition('.')[2]} {value}" for label, value in others.items())
        sentence = f"{held}: {text}" if held else text
        return Verdict(others=others, measure=measure, best=best, rank=smallest, text=text, sentence=sentence)

    found = [
        (_rank(point, axis), measured)
        for point in group
        if (measured := point.accuracy if graded else point.loss) is not None and not point.diverged
    ]
    if not found:
        return verdict("No rank has a result without a diverged member.")
    best, top = (max if graded else min)(found, key=lambda pair: pair[1].mean)
    if top.error is None:
        text = (
            f"The best {measure} is at r = {best}. One seed and no graded answers tell no standard error, so no "
            "smaller rank can be called as good; repeat with --seeds 3."
        )
        return verdict(text, best)
    reach = top.error + 1e-9 * abs(top.mean)  # shares of rows often lie exactly one error apart
    smallest = min(rank for rank, measured in found if abs(measured.mean - top.mean) <= reach)
    shown = (lambda value: f"{100 * value:.1f} %") if graded else (lambda value: f"{value:.4f}")
    kind = f"over {top.count} seeds" if top.count > 1 else "binomial, of the graded rows, as there is one seed"
    text = (
        f"Diminishing returns from r = {smallest}: the smallest rank whose mean {measure} is within one standard error "
        f"of the best ({shown(top.mean)} ± {shown(top.error)} at r = {best}; the error is {kind})."
    )
    return verdict(text, best, smallest)
