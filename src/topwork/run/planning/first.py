"""A plan before a training begins: what would fit, for a refusal."""

from topwork.plan.fits import Change, Job, changes_that_fit
from topwork.run.planning.place import gigabytes
from topwork.run.planning.text import written


def would_fit(job: Job) -> str:
    """What to change so that a job fits which does not, as lines behind a refusal; "" where nothing is known."""
    changes = [] if job.fit.fits else changes_that_fit(job)
    if not changes:
        return ""
    head = "What would make it fit" if changes[-1].fits else "Nothing makes it fit; nearest come"
    return "\n".join([f"\n{head}, the least harmful first, each with those above it:", *map(_line, changes)])


def _line(change: Change) -> str:
    fits = ", and it fits" if change.fits else ""
    return (
        f"  {change.key}: {written(change.value)} saves {gigabytes(change.saved_bytes)}; "
        f"{gigabytes(change.total_bytes)} are needed then{fits} ({change.says})"
    )
