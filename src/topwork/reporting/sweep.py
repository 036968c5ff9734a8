"""A sweep's report: OUT/sweep.md and OUT/sweep.html (with its pictures inside), from sweep.json and metrics.

The pictures stand in OUT/pictures as PNG as well.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topwork.common.errors import RequestError
from topwork.common.files import write_bytes, write_text
from topwork.reporting.curves import DARK, LIGHT, png_bytes
from topwork.reporting.page import Picture, data_uri, environment
from topwork.reporting.readers import Record, read_metrics
from topwork.reporting.sweep_charts import axis_chart, curves_chart
from topwork.reporting.sweep_points import DIVERGED, members, points
from topwork.reporting.sweep_text import base_scores, markdown, page_values

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


def write_sweep_report(folder: Path, report: Callable[[str], None] = print) -> SweepReport:
    """Write the report of a sweep's folder. Without matplotlib there are no pictures, and `report` is told so.

    Raises RequestError where the folder holds no sweep.
    """
    sweep = read_sweep(folder)
    records = {str(member["name"]): _records(folder, member) for member in members(sweep)}
    charts = _charts(sweep, records)
    pictures: list[Picture] = []
    try:
        for chart in charts:
            write_bytes(folder / "pictures" / f"{chart.file}.png", png_bytes(chart.draw(theme=LIGHT)))
            light, dark = (data_uri(chart.draw, theme) for theme in (LIGHT, DARK))
            pictures.append(Picture(chart.title, chart.description, light, dark))
    except RequestError as error:
        report(f"the report has no pictures: {error}")
        charts, pictures = [], []
    write_text(folder / "sweep.md", markdown(sweep, {chart.title: f"pictures/{chart.file}.png" for chart in charts}))
    template = environment().get_template("sweep.html.jinja")
    write_text(folder / "sweep.html", template.render(pictures=pictures, **page_values(sweep)))
    return SweepReport(folder / "sweep.md", folder / "sweep.html")


def read_sweep(folder: Path) -> dict[str, Any]:
    """sweep.json. Raises RequestError where there is none, or it is not whole."""
    file = folder / "sweep.json"
    try:
        sweep = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise RequestError(f"no sweep in '{folder}' ({file.name} is missing); name a sweep's folder") from error
    except ValueError as error:
        raise RequestError(f"{file} is not whole JSON ({error}); run the sweep again with --resume") from error
    if not isinstance(sweep, dict) or not members(sweep):
        raise RequestError(f"{file} tells of no members; run the sweep again")
    return sweep


def _records(folder: Path, member: Mapping[str, Any]) -> list[Record]:
    try:
        return read_metrics(folder / str(member.get("folder")) / "metrics.jsonl")
    except RequestError:  # it has not begun
        return []


def _charts(sweep: Mapping[str, Any], records: Mapping[str, list[Record]]) -> list[_Chart]:
    all_members, found = members(sweep), points(sweep)
    lost = sum(member.get("state") == DIVERGED for member in all_members)
    told = f"Validation loss over steps of {len(all_members)} members, {lost} of them diverged."
    charts = [_Chart("curves", "All members", told, partial(curves_chart, all_members, records))]
    base = base_scores(sweep)
    for label in sweep.get("axes", {}):
        own = [point for point in found if label in point.values and not point.left]
        for measure, named, key in (("accuracy", "Exact answers", "exact_match"), ("loss", "Loss", "loss")):
            measured = [point for point in own if (point.accuracy if measure == "accuracy" else point.loss) is not None]
            if not measured:
                continue
            at_base = base.get(key) if measure == "accuracy" else None  # a bare base's loss would flatten the others
            file = f"{measure}-{label.replace('/', '-').replace(' ', '-')}"
            draw = partial(axis_chart, own, label, measure, base=at_base)
            told = f"{named} of {len(measured)} points against {label}, with standard errors."
            charts.append(_Chart(file, f"{named} against {label}", told, draw))
    return charts
