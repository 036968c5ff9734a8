"""A sweep's report: OUT/sweep.md and OUT/sweep.html (with its pictures inside), from sweep.json and metrics.

The pictures stand in OUT/pictures as PNG as well.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from topwork.common.errors import RequestError
from topwork.common.files import write_bytes, write_text
from topwork.reporting.curves import DARK, LIGHT, png_bytes
from topwork.reporting.page import Picture, data_uri, environment
from topwork.reporting.readers import Record
from topwork.reporting.sweep_charts import axis_chart, curves_chart
from topwork.reporting.sweep_points import points
from topwork.reporting.sweep_state import PICTURES, REPORTS, SweepState, TrialState, read_sweep, trial_metrics
from topwork.reporting.sweep_text import base_scores, markdown, page_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SweepReport:
    """What was written."""

    markdown: Path
    html: Path


@dataclass(frozen=True)
class _Chart:
    """A picture yet to be drawn: `draw(theme=…)`."""

    file: str
    title: str
    description: str
    draw: "Callable[..., Figure]"


MEASURES = {"accuracy": "Exact answers", "loss": "Loss"}


def write_sweep_report(folder: Path, log: Callable[[str], None] = print) -> SweepReport:
    """Write the report of a sweep's folder. Without matplotlib there are no pictures, and `log` is told so.

    Raises RequestError where the folder holds no sweep.
    """
    sweep = read_sweep(folder)
    charts = _charts(sweep, {trial.name: trial_metrics(folder, trial) for trial in sweep.trials})
    pictures: list[Picture] = []
    try:
        for chart in charts:
            write_bytes(folder / PICTURES / f"{chart.file}.png", png_bytes(chart.draw(theme=LIGHT)))
            light, dark = (data_uri(chart.draw, theme) for theme in (LIGHT, DARK))
            pictures.append(Picture(chart.title, chart.description, light, dark))
    except RequestError as error:
        log(f"the report has no pictures: {error}")
        charts, pictures = [], []
    page = page_of(sweep)
    written = SweepReport(*(folder / name for name in REPORTS))
    write_text(written.markdown, markdown(page, {chart.title: f"{PICTURES}/{chart.file}.png" for chart in charts}))
    template = environment().get_template("sweep.html.jinja")
    write_text(written.html, template.render(pictures=pictures, **vars(page)))
    return written


def picture_names(sweep: SweepState) -> list[str]:
    """The files of a sweep's folder that its report may have drawn."""
    files = [f"{measure}-{_in_file(label)}" for label in sweep.axes for measure in MEASURES]
    return [f"{PICTURES}/{file}.png" for file in ("curves", *files)]


def _in_file(label: str) -> str:
    return label.replace("/", "-").replace(" ", "-")


def _charts(sweep: SweepState, records: Mapping[str, list[Record]]) -> list[_Chart]:
    found, base = points(sweep), base_scores(sweep)
    lost = sum(trial.state is TrialState.DIVERGED for trial in sweep.trials)
    told = f"Validation loss over steps of {len(sweep.trials)} members, {lost} of them diverged."
    charts = [_Chart("curves", "All members", told, partial(curves_chart, sweep.trials, records))]
    for label in sweep.axes:
        own = [point for point in found if label in point.values and not point.left]
        for measure, named in MEASURES.items():
            measured = [point for point in own if (point.accuracy if measure == "accuracy" else point.loss) is not None]
            if not measured:
                continue
            # a bare base's loss would flatten the others
            at_base = base.exact_match if base and measure == "accuracy" else None
            file = f"{measure}-{_in_file(label)}"
            draw = partial(axis_chart, own, label, measure, base=at_base)
            told = f"{named} of {len(measured)} points against {label}, with standard errors."
            charts.append(_Chart(file, f"{named} against {label}", told, draw))
    return charts
