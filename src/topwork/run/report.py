"""`topwork report`: a run as one page."""

from pathlib import Path

from topwork.common.os_errors import explained
from topwork.reporting.page import ReportPaths, write_report


@explained()
def report(run: Path | str) -> ReportPaths:
    """Write RUN/report/index.html and its pictures."""
    return write_report(Path(run))
