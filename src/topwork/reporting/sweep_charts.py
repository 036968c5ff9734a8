"""Charts of a sweep: all members' validation losses over steps, and the final figures along each axis."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from topwork.reporting.curves import LIGHT, Theme, canvas, choose_scale, plain, series
from topwork.reporting.readers import Record
from topwork.reporting.sweep_state import Estimate, Point, TrialRecord, TrialState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_AXIS_RATIO = 10.0
"""From this ratio of an axis's largest to its smallest value on, it is drawn in the logarithm."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#7f7f7f")
"""Okabe and Ito's, which people with any kind of colour vision tell apart."""
MOST_LABELLED = 12
"""More curves than these have no legend; the table names them."""


def curves_chart(
    trials: Sequence[TrialRecord],
    records: Mapping[str, Sequence[Record]],
    *,
    theme: Theme = LIGHT,
    size: tuple[float, float] = (9.4, 4.4),
) -> "Figure":
    """Validation loss (training loss where nothing was held out) of every trial over steps; one that diverged ends in
    a cross. Trials of one point, which differ in the seed, share a colour."""
    figure, axes = canvas(theme, size)
    names = list(dict.fromkeys(trial.point for trial in trials))
    colours = _colours(len(names), theme)
    drawn: list[float] = []
    for trial in trials:
        known = records.get(trial.name, ())
        measured = series(known, "eval", "loss")
        measured = measured if measured.steps else series(known, "train", "loss")
        if not measured.steps:
            continue
        first = next(other for other in trials if other.point == trial.point) is trial
        colour, lost = colours[names.index(trial.point)], trial.state is TrialState.DIVERGED
        axes.plot(
            measured.steps, measured.values, color=colour, linewidth=1.5, linestyle=":" if lost else "-", marker="o",
            markersize=3, alpha=0.9, label=trial.point if first else None,
        )  # fmt: skip
        if lost:
            axes.plot(measured.steps[-1:], measured.values[-1:], color=colour, marker="x", markersize=10, mew=2.5)
        drawn += measured.values
    choose_scale(axes, drawn)
    axes.set_xlabel("step", color=theme.muted)
    axes.set_ylabel("validation loss", color=theme.muted)
    if drawn and len(names) <= MOST_LABELLED:
        _legend(axes, theme)
    return figure


def axis_chart(
    points: Sequence[Point],
    label: str,
    measure: str,
    *,
    base: float | None = None,
    theme: Theme = LIGHT,
    size: tuple[float, float] = (4.6, 3.2),
) -> "Figure":
    """`measure` (loss or accuracy) of the points along one axis, with their standard errors; a line for each
    combination of the other axes. Values of which a trial diverged are crosses at the rim; `base` is the bare base's.
    """
    figure, axes = canvas(theme, size)
    groups = grouped(points, label)
    ordered = numeric([point.values[label] for point in points])
    shown = list(dict.fromkeys(str(plain_value(point.values[label])) for point in points))
    colours = _colours(len(groups), theme)
    for colour, (name, group) in zip(colours, groups.items()):
        measured = [(_place(p, label, shown, ordered), e) for p in group if (e := _of(p, measure)) is not None]
        _draw(axes, sorted(measured, key=lambda pair: pair[0]), colour, name, measure, ordered)
        lost = [_place(point, label, shown, ordered) for point in group if point.diverged]
        _draw_lost(axes, lost, colour, ordered)
    if base is not None:
        line = axes.axhline if ordered else axes.axvline
        line(base * _scale(measure), color=theme.muted, linewidth=1, linestyle=":", label="bare base")
    _dress(axes, label, measure, [_number(point.values[label]) for point in points] if ordered else [], shown, theme)
    if len(groups) > 1 or base is not None:
        _legend(axes, theme)
    return figure


def grouped(points: Sequence[Point], label: str) -> dict[str, list[Point]]:
    """Points by the values of the axes other than `label`, in words."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        others = [f"{name.rpartition('.')[2]} {plain_value(v)}" for name, v in point.values.items() if name != label]
        groups.setdefault(", ".join(others), []).append(point)
    return groups


def numeric(values: Sequence[Any]) -> bool:
    """Whether an axis of these values is one of numbers."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def plain_value(value: Any) -> Any:
    """A value as people read it."""
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else value


def _draw(
    axes: "Axes", measured: Sequence[tuple[float, Estimate]], colour: Any, name: str, measure: str, ordered: bool
) -> None:
    if not measured:
        return
    places = [place for place, _ in measured]
    means = [estimate.mean * _scale(measure) for _, estimate in measured]
    errors = [(estimate.error or 0.0) * _scale(measure) for _, estimate in measured]
    style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 5, "capsize": 3, "label": name or None}
    if ordered:
        axes.errorbar(places, means, yerr=errors, linewidth=1.6, **style)
    else:
        axes.errorbar(means, places, xerr=errors, linestyle="none", elinewidth=1.6, **style)


def _draw_lost(axes: "Axes", places: Sequence[float], colour: Any, ordered: bool) -> None:
    """Crosses at the upper (or right) rim."""
    for place in places:
        at = ([place], [0.97]) if ordered else ([0.97], [place])
        transform = axes.get_xaxis_transform() if ordered else axes.get_yaxis_transform()
        axes.plot(*at, transform=transform, color=colour, marker="x", markersize=8, mew=2.5, linestyle="none")


def _dress(axes: "Axes", label: str, measure: str, values: Sequence[float], shown: Sequence[str], theme: Theme) -> None:
    """Scales, ticks and names of the axes."""
    from matplotlib.ticker import AutoLocator, FixedLocator, FuncFormatter, NullLocator

    named = "exact answers, %" if measure == "accuracy" else "loss"
    if not values:
        axes.set_yticks(range(len(shown)), shown)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.xaxis.set_major_locator(AutoLocator())
        axes.set_xlabel(named, color=theme.muted)
        return
    if min(values) > 0 and max(values) / min(values) >= LOG_AXIS_RATIO:
        axes.set_xscale("log")
        distinct = sorted(set(values))
        axes.xaxis.set_major_locator(FixedLocator(distinct[:: math.ceil(len(distinct) / 7)]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(plain))
    else:
        axes.xaxis.set_major_locator(AutoLocator())
    axes.set_xlabel(label, color=theme.muted)
    axes.set_ylabel(named, color=theme.muted)


def _legend(axes: "Axes", theme: Theme) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3, frameon=False, labelcolor=theme.ink, fontsize=8.5,
        handlelength=1.4, columnspacing=1.2,
    )  # fmt: skip


def _colours(count: int, theme: Theme) -> list[Any]:
    """Tellable apart up to eight; beyond them a ramp."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    from matplotlib import colormaps

    low, high = (0.0, 0.85) if theme is LIGHT else (0.2, 1.0)
    return [colormaps["viridis"](low + (high - low) * index / (count - 1)) for index in range(count)]


def _place(point: Point, label: str, shown: Sequence[str], ordered: bool) -> float:
    value = point.values[label]
    return _number(value) if ordered else float(shown.index(str(plain_value(value))))


def _number(value: Any) -> float:
    return float(value)


def _of(point: Point, measure: str) -> Estimate | None:
    return point.accuracy if measure == "accuracy" else point.loss


def _scale(measure: str) -> float:
    return 100.0 if measure == "accuracy" else 1.0
