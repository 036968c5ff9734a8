"""`topwork report`: a run as one page."""

from functools import partial
from pathlib import Path

from topwork.reporting.page import ReportPaths, write_report
from topwork.run.ownership import own


def report(run: Path | str) -> ReportPaths:
    """Write RUN/report/index.html and its pictures."""
    return write_report(Path(run), partial(own, Path(run)))
