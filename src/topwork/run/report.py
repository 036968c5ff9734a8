"""`topwork report`: a run as one page, finished or not."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from topwork.common.errors import RequestError
from topwork.reporting.checkpoints import up_to
from topwork.reporting.page import ReportPaths, write_page
from topwork.reporting.readers import read_run
from topwork.run.folder import RECIPE, REPORT, read_recipe
from topwork.run.keeping import check_writable
from topwork.run.ownership import is_run, own

PAGE = {"index.html", "curves.png"}


def report(
    run: Path | str,
    *,
    model: str | None = None,  # noqa: ARG001 (the same options go to every verb that reads a run)
    checkpoint: str | int | None = None,
    out: Path | str | None = None,
    log: Callable[[str], None] = print,
) -> ReportPaths:
    """Write RUN/report/index.html and its pictures, of a run that has not finished too.

    checkpoint  the run up to this step (or `best`, `last`), with that checkpoint's scores, in RUN/report-step-NNNNNN/
    out         a folder in their place
    model       where the base is now, which changes nothing: a page needs none

    Raises RequestError before any work where the page could not be written.
    """
    place, step = _asked(Path(run), checkpoint, log)
    files = read_run(place)
    files = files if step is None else up_to(files, place, step)
    name = REPORT if step is None else f"{REPORT}-step-{step:06d}"
    folder = place / name if out is None else _free(Path(out))
    check_writable(folder, "the page", "a FOLDER for it with --out")
    listed = out is None and is_run(place)
    return write_page(files, folder, partial(own, place) if listed else lambda *_: None)


def _asked(place: Path, checkpoint: str | int | None, log: Callable[[str], None]) -> tuple[Path, int | None]:
    """The run and the step of its checkpoint. Importing what reads adapters takes seconds that a page seldom needs."""
    if checkpoint is None and (place / RECIPE).is_file():
        return place, None
    from topwork.run.chosen import choose
    from topwork.run.given import run_of

    run, step = run_of(place)
    asked = checkpoint if step is None else step
    return run, None if asked is None else choose(run, read_recipe(run), asked, log).checkpoint


def _free(out: Path) -> Path:
    """Raises RequestError where a page would lie among other files."""
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out} is a file; give a folder for the page")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if held and not held >= PAGE:
        raise RequestError(f"--out {out} holds other files; give a new or empty folder, or one with an earlier report")
    return out
