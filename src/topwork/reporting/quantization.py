"""The chart of `topwork quantize --analyze`: what each data type loses, what it takes, what it does to a text."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from topwork.common.errors import RequestError
from topwork.quantization.error import BITS, SWEPT, FormatErrors
from topwork.reporting.curves import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOUR_BIT = tuple(name for name in SWEPT if BITS[name] == 4)
MARKERS = {"nf4": "o", "fp4": "s", "int4": "^", "int8": "D"}


def quantization_chart(
    measured: Sequence[FormatErrors], perplexities: Mapping[str, float] | None, title: str, theme: Theme = LIGHT
) -> "Figure":
    """Four panels: signal-to-noise over block size of the 4-bit types and of int8, signal-to-noise over bits, and
    perplexity by type where it was measured. Raises RequestError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RequestError(
            "the chart is drawn with matplotlib, which is not installed; install it with: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(11.0, 7.4), layout="constrained")
    panels = figure.subplots(2, 2)
    for axes in panels.flat:
        _plain_axes(axes, theme)
    _over_blocks(panels[0, 0], measured, FOUR_BIT, theme)
    _over_blocks(panels[1, 0], measured, ("int8",), theme)
    _over_bits(panels[0, 1], measured, theme)
    if perplexities is None:
        panels[1, 1].set_visible(False)
    else:
        _bars(panels[1, 1], perplexities, theme)
    figure.suptitle(title, x=0.02, ha="left", color=theme.ink, fontsize=12, fontweight="bold")
    return figure


def _over_blocks(axes: "Axes", measured: Sequence[FormatErrors], types: Sequence[str], theme: Theme) -> None:
    for name in types:
        rows = _of(measured, name, double_quant=False)
        sizes = [row.format.block_size or 0 for row in rows]
        axes.plot(
            sizes, [_ratio(row.whole.snr_db) for row in rows], color=_color(name, theme), marker=MARKERS[name],
            markersize=4.5, linewidth=1.8, label=name,
        )  # fmt: skip
        axes.plot(
            sizes, [_ratio(row.normal_snr_db) for row in rows], color=_color(name, theme), linewidth=1.0, linestyle=":",
            label=f"{name}, normal weights",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    _named(axes, "block size", "signal-to-noise, dB", theme)
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8.5)


def _over_bits(axes: "Axes", measured: Sequence[FormatErrors], theme: Theme) -> None:
    for name in FOUR_BIT:
        for double_quant in (False, True):
            rows = _of(measured, name, double_quant)
            axes.plot(
                [row.bits_per_parameter for row in rows], [_ratio(row.whole.snr_db) for row in rows],
                color=_color(name, theme), marker=MARKERS[name], markersize=4.5, linewidth=1.4,
                linestyle="--" if double_quant else "-", label=f"{name} + DQ" if double_quant else name,
            )  # fmt: skip
    _named(axes, "bits per parameter", "signal-to-noise, dB", theme)
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8.5, ncols=2)


def _bars(axes: "Axes", perplexities: Mapping[str, float], theme: Theme) -> None:
    names = list(perplexities)[::-1]
    values = [perplexities[name] for name in names]
    bars = axes.barh(names, values, color=[_color(name.split()[0], theme) for name in names], height=0.6)
    axes.bar_label(bars, fmt="%.2f", padding=3, color=theme.ink, fontsize=9)
    axes.grid(visible=False)
    axes.margins(x=0.12)
    _named(axes, "perplexity, blocks of 64", "", theme)


def _of(measured: Sequence[FormatErrors], name: str, double_quant: bool) -> list[FormatErrors]:
    """A type's rows by rising block size."""
    rows = [
        row
        for row in measured
        if (row.format.quant_type, row.format.double_quant) == (name, double_quant) and row.format.block_size
    ]
    return sorted(rows, key=lambda row: row.format.block_size or 0)


def _ratio(value: float | None) -> float:
    return float("nan") if value is None else value


def _color(name: str, theme: Theme) -> str:
    colors = {"nf4": theme.train, "fp4": theme.validation, "int4": theme.other, "int8": "#cc79a7", "e2m1": "#e69f00"}
    return colors.get(name, theme.muted)


def _named(axes: "Axes", x: str, y: str, theme: Theme) -> None:
    axes.set_xlabel(x, color=theme.muted)
    axes.set_ylabel(y, color=theme.muted)


def _plain_axes(axes: "Axes", theme: Theme) -> None:
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.tick_params(colors=theme.muted, length=0, labelsize=9)
