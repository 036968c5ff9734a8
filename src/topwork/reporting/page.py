"""`topwork report`: a run folder becomes one HTML page that needs nothing beside itself, and PNGs of its curves."""

from base64 import b64encode
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from topwork.common.files import write_bytes
from topwork.reporting import sections, wording
from topwork.reporting.curves import DARK, LIGHT, Theme, curves, png_bytes, series, small_chart, svg_bytes
from topwork.reporting.endings import rows_told
from topwork.reporting.readers import Record, RunFiles, entries, number, section

if TYPE_CHECKING:
    from collections.abc import Callable

    from jinja2 import Environment
    from matplotlib.figure import Figure

SMALL_CHARTS = (
    ("learning_rate", "Learning rate", False),
    ("grad_norm", "Gradient norm", True),
    ("tokens_per_second", "Tokens per second", True),
)
"""Key in the training records, title, whether the value is noisy and wants smoothing."""


@dataclass(frozen=True)
class ReportPaths:
    """The page, and a picture of its curves where there are some."""

    html: Path
    curves_png: Path | None


@dataclass(frozen=True)
class Picture:
    """One chart as data URIs: a drawing for each ground and, where the wide one would be unreadable, for phones."""

    title: str
    description: str
    light: str
    dark: str
    light_narrow: str | None = None
    dark_narrow: str | None = None


def write_page(run: RunFiles, folder: Path, own: "Callable[..., None]" = lambda *_: None) -> ReportPaths:
    """Write index.html, curves.png and one PNG per small chart into `folder`.

    Everything is drawn before anything is written; `own` is told the names, below the folder that holds `folder`,
    first. Raises RequestError where matplotlib is missing.
    """
    records = _with_start(run)
    pngs = {"curves.png": png_bytes(curves(records, title=run.name))} if records else {}
    for key, title, smooth in _measured_charts(records):
        figure = small_chart(records, key, smooth=smooth)
        figure.suptitle(title, x=0.02, ha="left", fontsize=10)
        pngs[f"{key.replace('/', '-')}.png"] = png_bytes(figure)
    html = render(run)
    own(*(f"{folder.name}/{name}" for name in (*pngs, "index.html")))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in [*pngs.items(), ("index.html", html.encode())]:
        write_bytes(folder / name, content)
    return ReportPaths(html=folder / "index.html", curves_png=folder / "curves.png" if records else None)


def render(run: RunFiles) -> str:
    """The page as text. Every value from the run is escaped; the page's own policy forbids scripts and requests."""
    records = _with_start(run)
    parameters = section(run.result, "parameters")
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            name=run.name,
            kind="Adapter" if run.alone else "Topwork run",
            headline=sections.headline(run),
            cards=sections.cards(run),
            notes=sections.notes(run),
            loss_picture=_loss_picture(records) if records else None,
            small_pictures=[_small_picture(records, *chart) for chart in _measured_charts(records)],
            scores=sections.scores(run.evaluation),
            evaluation_rows_told=rows_told(number(run.evaluation, "rows")),
            evaluation_facts=sections.evaluation_facts(run.evaluation),
            samples=sections.samples(run.evaluation),
            sample_count=len(entries(run.evaluation, "samples")),
            parameters={key: number(parameters, key) for key in ("trainable", "frozen", "total", "share")},
            parameter_rows=sections.parameter_rows(run.result),
            data_facts=sections.facts(section(run.result, "data")),
            recipe_text=run.recipe_text,
            provenance_facts=sections.facts(run.provenance),
        )
    )


def environment() -> "Environment":
    """Where templates come from; every value in them is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("topwork.reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"whole": wording.whole, "share": wording.share, "count": wording.count}
    return made


def _with_start(run: RunFiles) -> list[Record]:
    """The records, with the validation before the first step in front where only the result tells it."""
    before = number(run.result, "eval_loss_before")
    steps = series(run.records, "eval", "loss").steps
    if before is None or (steps and steps[0] == 0):
        return list(run.records)
    return [{"kind": "eval", "step": 0, "loss": before}, *run.records]


def _measured_charts(records: list[Record]) -> list[tuple[str, str, bool]]:
    """Of the figures that every run has and of the objective's own, those that were measured more than once."""
    names = dict.fromkeys(name for record in records for name in section(record, "metrics"))
    own = [(f"metrics.{name}", name.replace("_", " ").capitalize(), True) for name in names]
    return [chart for chart in (*SMALL_CHARTS, *own) if len(series(records, "train", chart[0]).steps) > 1]


def _loss_picture(records: list[Record]) -> Picture:
    train, validation = series(records, "train", "loss"), series(records, "eval", "loss")
    parts = [
        f"{name} loss from {wording.loss(measured.values[0])} to {wording.loss(measured.values[-1])}"
        for name, measured in (("training", train), ("validation", validation))
        if measured.values
    ]
    last = max([*train.steps, *validation.steps], default=0)
    wide = partial(data_uri, partial(curves, records, size=(9.4, 3.9)))
    narrow = partial(data_uri, partial(curves, records, size=(4.3, 3.5)))
    description = f"Curves over {last} steps: {'; '.join(parts) or 'no finite loss'}."
    return Picture("Loss", description, wide(LIGHT), wide(DARK), narrow(LIGHT), narrow(DARK))


def _small_picture(records: list[Record], key: str, title: str, smooth: bool) -> Picture:
    values = series(records, "train", key).values
    draw = partial(data_uri, partial(small_chart, records, key, smooth=smooth))
    description = f"{title} from {min(values):.4g} to {max(values):.4g}, {values[-1]:.4g} at the end."
    return Picture(title, description, draw(LIGHT), draw(DARK))


def data_uri(draw: "Callable[..., Figure]", theme: Theme) -> str:
    """What `draw(theme=theme)` gives, as a drawing that stands in the page itself."""
    return "data:image/svg+xml;base64," + b64encode(svg_bytes(draw(theme=theme))).decode()
