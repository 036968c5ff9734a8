"""What a command adds to a run's folder, or writes where it is told. The folder may be another's and only be read: that
is looked for before the work, and what was found is never lost for it."""

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError, TopworkError
from topwork.common.files import write_json
from topwork.run.ownership import is_run, own

SCORES = {"rows", "grader"}
"""What every evaluation says."""
Log = Callable[[str], None]


def check_writable(place: Path, what: str, instead: str) -> None:
    """Raises RequestError where no file can be put at `place`, or into it where it is a folder; tried by making one,
    since rights alone do not tell it of every user and every disk."""
    place = place.resolve()
    holds = place if place.is_dir() else place.parent
    nearest = next(path for path in (holds, *holds.parents) if path.exists())
    probe = nearest / f".topwork-new-{place.name}-{secrets.token_hex(4)}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise RequestError(
            f"{what} would go to {place}, and nothing can be written in {nearest} ({error.strerror}); give {instead}"
        ) from error


def refuse_other_file(out: Path) -> None:
    """Raises RequestError where scores would replace something else, say the very rows."""
    if out.is_dir():
        raise RequestError(f"--out {out} is a folder; give a file, say {out / 'scores.json'}")
    try:
        held = json.loads(out.read_text("utf-8")) if out.exists() else dict.fromkeys(SCORES)
    except (OSError, ValueError):
        held = None
    if not (isinstance(held, dict) and held.keys() >= SCORES):
        raise RequestError(f"--out {out} holds something else than scores; name another file")


def keep_scores(result: dict[str, Any], target: Path, run: Path | None, log: Log) -> dict[str, Any]:
    """Write scores to a file, of `run` where that is given. What cannot be written is logged, and is returned with the
    reason as `not_written`."""
    try:
        keep_json(result, target, run)
    except (OSError, TopworkError, ValueError) as error:
        log(f"warning: the scores could not be written to {target} ({error}); here they are:")
        log(json.dumps(result))
        return result | {"not_written": str(error)}
    return result


def keep_json(value: dict[str, Any], target: Path, run: Path | None) -> None:
    """Write a file; where it is a run's it is listed as the run's own."""
    if run is not None and is_run(run):
        own(run, target.relative_to(run).as_posix())
    write_json(target, value)
