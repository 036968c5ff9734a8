"""Charts of a run: loss and validation curves, and the small ones beside them.

Figures are made without pyplot, so nothing global changes and no display is needed. Colours are Okabe and Ito's, which
people with any kind of colour vision tell apart; lines differ in form as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from topwork.common.errors import RequestError
from topwork.reporting.readers import Record, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_SCALE_RATIO = 20.0
"""From this ratio of the largest to the smallest loss on, a linear axis would flatten the end of the curve."""
SMOOTHED_PART = 20
"""The smoothed line averages this n-th part of the run on both sides of a step; shorter runs have none."""
DRAWN_POINTS = 1000
"""A longer curve is drawn with every n-th of its raw points; the smoothed line is made from all of them."""


@dataclass(frozen=True)
class Theme:
    """Colours of one chart. `paper` is what the chart lies on; it is drawn only into PNGs."""

    ink: str
    muted: str
    grid: str
    paper: str
    train: str
    validation: str
    other: str


LIGHT = Theme("#1c2127", "#5c6670", "#e4e7eb", "#ffffff", "#0072b2", "#d55e00", "#007a5a")
DARK = Theme("#e9ecef", "#9aa4ae", "#333b44", "#1a1f25", "#56b4e9", "#e69f00", "#2fbf96")


@dataclass(frozen=True)
class Series:
    """The steps at which a value was measured, and the finite values."""

    steps: list[int]
    values: list[float]


def series(records: Sequence[Record], kind: str, key: str) -> Series:
    """`key` of every record of `kind` (`metrics.NAME`: an objective's own figure); records without it, or where it is
    not finite, are passed over."""
    path = key.split(".", 1)
    pairs = [(int(record["step"]), number(record, *path)) for record in records if record["kind"] == kind]
    measured = [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]
    return Series([step for step, _ in measured], [value for _, value in measured])


def smoothed(values: Sequence[float]) -> list[float]:
    """Moving mean over about a tenth of the run, centred, so that the line does not lag; short runs stay as they are.

    Towards the steep start the window shrinks on both sides; at the flat end only its right half is lost.
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half, last = len(values) // SMOOTHED_PART, len(values) - 1
    means = []
    for at in range(len(values)):
        left, right = min(half, at), min(half, at, last - at)
        means.append((sums[at + right + 1] - sums[at - left]) / (left + right + 1))
    return means


def curves(
    records: Sequence[Record],
    *,
    title: str | None = None,
    theme: Theme = LIGHT,
    size: tuple[float, float] = (9.0, 4.2),
) -> "Figure":
    """Training loss (raw thin, smoothed thick), validation loss and its lowest point, over optimizer steps.

    records   lines of metrics.jsonl (`topwork.reporting.readers.read_metrics`)
    size      inches
    The loss axis is logarithmic where the range demands it. Raises RequestError where matplotlib is missing.
    """
    figure, axes = canvas(theme, size)
    train, validation = series(records, "train", "loss"), series(records, "eval", "loss")
    if train.steps:
        name = "training, smoothed" if len(train.steps) >= SMOOTHED_PART else "training"
        _draw_noisy(axes, train, theme.train, name)
    if validation.steps:
        _draw_validation(axes, validation, theme)
    _mark_epochs(axes, series(records, "train", "epoch"), theme)
    choose_scale(axes, smoothed(train.values) + validation.values)
    axes.set_xlabel("step", color=theme.muted)
    axes.set_ylabel("loss per learned token", color=theme.muted)
    if train.steps or validation.steps:
        columns = 4 if size[0] >= 7 else 2
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, frameon=False, labelcolor=theme.ink,
            fontsize=9.5, handlelength=1.6, columnspacing=1.4,
        )  # fmt: skip
    if title is not None:
        figure.suptitle(title, x=0.02, ha="left", color=theme.ink, fontsize=12, fontweight="bold")
    return figure


def small_chart(
    records: Sequence[Record],
    key: str,
    *,
    theme: Theme = LIGHT,
    smooth: bool = False,
    size: tuple[float, float] = (4.0, 2.1),
) -> "Figure":
    """One value of the training records over steps; `smooth` adds the smoothed line over the raw one."""
    figure, axes = canvas(theme, size)
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    measured = series(records, "train", key)
    if smooth:
        _draw_noisy(axes, measured, theme.other, "smoothed")
    else:
        axes.plot(measured.steps, measured.values, color=theme.other, linewidth=1.8)
    if measured.values and min(measured.values) >= 0:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_xlabel("step", color=theme.muted)
    return figure


def png_bytes(figure: "Figure", theme: Theme = LIGHT, dpi: int = 160) -> bytes:
    """The figure on its paper."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=theme.paper)
    return buffer.getvalue()


def svg_bytes(figure: "Figure") -> bytes:
    """The figure on a transparent ground, the same bytes every time."""
    from matplotlib import rc_context

    buffer = BytesIO()
    with rc_context({"svg.hashsalt": "topwork", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def canvas(theme: Theme, size: tuple[float, float]) -> "tuple[Figure, Axes]":
    """A figure with one pair of axes, `size` in inches. Raises RequestError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise RequestError(
            "the report draws its curves with matplotlib, which is not installed; "
            "install it with: pip install matplotlib"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.tick_params(colors=theme.muted, length=0, labelsize=9.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.margins(x=0.02)
    return figure, axes


def _draw_noisy(axes: "Axes", measured: Series, color: str, label: str) -> None:
    stride = max(1, len(measured.steps) // DRAWN_POINTS)
    steps, line = measured.steps[::stride], smoothed(measured.values)[::stride]
    axes.plot(steps, measured.values[::stride], color=color, linewidth=0.8, alpha=0.4)
    axes.plot(steps, line, color=color, linewidth=2.2, label=label)
    if len(measured.steps) == 1:
        axes.plot(steps, line, color=color, marker="o", markersize=5)


def _draw_validation(axes: "Axes", validation: Series, theme: Theme) -> None:
    axes.plot(
        validation.steps, validation.values, color=theme.validation, linewidth=1.6, linestyle=(0, (5, 2)), marker="o",
        markersize=4.5, label="validation",
    )  # fmt: skip
    best = min(range(len(validation.values)), key=lambda at: validation.values[at])
    axes.plot(
        [validation.steps[best]], [validation.values[best]], color=theme.validation, marker="*", markersize=15,
        markeredgecolor=theme.paper, markeredgewidth=1.0, linestyle="none", zorder=5,
        label=f"best {validation.values[best]:.4g} at step {validation.steps[best]}",
    )  # fmt: skip


def _mark_epochs(axes: "Axes", epochs: Series, theme: Theme) -> None:
    """A dotted line where each further epoch begins; rows seen again make the training loss fall in stairs there."""
    begins = [
        (step, int(now)) for before, now, step in zip(epochs.values, epochs.values[1:], epochs.steps[1:])
        if int(now) > int(before) and step < epochs.steps[-1]
    ]  # fmt: skip
    if len(begins) > 12:
        return
    for step, epoch in begins:
        axes.axvline(step, color=theme.muted, linewidth=0.8, linestyle=":", alpha=0.7)
        axes.annotate(
            f" epoch {epoch + 1}",
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=8.5,
            color=theme.muted,
        )


def choose_scale(axes: "Axes", values: Sequence[float]) -> None:
    """A logarithmic y axis where the values' range demands it."""
    if not values or min(values) <= 0 or max(values) / min(values) < LOG_SCALE_RATIO:
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    axes.yaxis.set_minor_locator(NullLocator())


def plain(value: float, _position: int) -> str:
    """A tick's number, for matplotlib's FuncFormatter."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
