"""`topwork report`: a run as one page, finished or not; or an adapter alone, of which less is known."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError, TopworkError
from topwork.common.os_errors import explained
from topwork.reporting.checkpoints import up_to
from topwork.reporting.page import ReportPaths, write_page
from topwork.reporting.readers import RunFiles, read_json, read_run
from topwork.run.folder import RECIPE, REPORT, read_recipe
from topwork.run.keeping import SCORES, check_writable
from topwork.run.ownership import is_run, own

PAGE = {"index.html", "curves.png"}
REPORTS = "reports"
"""Where the pages of adapters go that lie in nobody's run."""


@explained()
def report(
    run: Path | str,
    *,
    model: str | None = None,
    checkpoint: str | int | None = None,
    out: Path | str | None = None,
    scores: Path | str | None = None,
    log: Callable[[str], None] = print,
) -> ReportPaths:
    """Write RUN/report/index.html and its pictures, of a run that has not finished too; of a PEFT folder or a Hub id
    reports/NAME/index.html, with what its file tells.

    checkpoint  the run up to this step (or `best`, `last`), with that checkpoint's scores, in RUN/report-step-NNNNNN/
    out         a folder in their place
    model       where the base is now; a page needs no more of it than its config
    scores      of an adapter alone: what `topwork eval --out` wrote

    Raises RequestError before any work where the page could not be written.
    """
    if (alone := _alone(run, model, checkpoint, scores)) is not None:
        folder = Path(REPORTS) / alone.name.replace("/", "--") if out is None else Path(out)
        _refuse_others(folder)
        check_writable(folder, "the page", "a FOLDER for it with --out")
        return write_page(alone, folder)
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


def _alone(
    named: Path | str, model: str | None, checkpoint: str | int | None, scores: Path | str | None
) -> RunFiles | None:
    """What is known of an adapter that no run tells of; None for a run. Raises RequestError."""
    if (Path(named) / RECIPE).is_file():  # without importing what reads adapters
        _no_scores(named, scores)
        return None
    from topwork.run.given import given_adapter, is_alone

    if not is_alone(named, model):
        _no_scores(named, scores)
        return None
    given = given_adapter(named, model, checkpoint)
    problems: list[str] = ["It lies in no run's folder: what it was trained on, and how, its file does not tell."]
    result = _counted(given, problems)
    return RunFiles(
        name=given.name,
        records=(),
        recipe_text="",
        recipe={"adapter": given.saved.config.model_dump(mode="json")},
        result=result,
        provenance={"base": {"id": given.saved.base.name or given.model.model_name_or_path}},
        evaluation=_scores(Path(scores)) if scores is not None else {},
        problems=tuple(problems),
        alone=True,
    )


def _no_scores(named: Path | str, scores: Path | str | None) -> None:
    """Raises RequestError where scores are given for a run, which has its own."""
    if scores is not None:
        raise RequestError(f"--scores {scores}: {named} has its own (topwork eval); leave --scores out")


def _scores(file: Path) -> Mapping[str, Any]:
    problems: list[str] = []
    found = read_json(file, problems)
    if problems or not found.keys() >= SCORES:
        raise RequestError(f"--scores {file} holds no scores; give a FILE that `topwork eval --out FILE` wrote")
    return found


def _counted(given: Any, problems: list[str]) -> dict[str, Any]:
    """How many parameters it has, by its base's config alone; told as a problem where that is not to be had."""
    from topwork.plan.base import structure_named
    from topwork.plan.count import count_adapter

    try:
        counted = count_adapter(structure_named(given.model), given.saved.config)
    except TopworkError as error:
        problems.append(f"How much it trains of its base is not known: {str(error).splitlines()[0]}")
        return {}
    return {"parameters": json.loads(json.dumps(asdict(counted)))}


def _free(out: Path) -> Path:
    """Raises RequestError where a page would lie among other files."""
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out} is a file; give a folder for the page")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if held and not held >= PAGE:
        raise RequestError(f"--out {out} holds other files; give a new or empty folder, or one with an earlier report")
    return out


def _refuse_others(out: Path) -> None:
    """Raises RequestError where the page of an adapter alone, which is one file, would lie among other files."""
    page = out / "index.html"
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    ours = page.is_file() and "<code>topwork report</code>" in page.read_text("utf-8", errors="replace")
    if held and not (held == {page.name} and ours):
        raise RequestError(f"{out} holds other files; give a new or empty folder with --out, or one with such a page")
