"""`topwork report`."""

from topwork.cli.options import Run

EPILOG = "Example: topwork report runs/support"


def report(run: Run) -> None:
    """Write a run's page: curves, scores, samples, counts, memory and speed."""
    from topwork.run.report import report as write

    paths = write(run)
    print(f"{paths.html}\n{paths.curves_png}")
