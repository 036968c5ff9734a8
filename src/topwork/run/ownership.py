"""What of a folder is a run's own: RUN/run.json lists it, and only Topwork writes that file.

A run is recognised by it, whatever else lies in the folder, and nothing that it does not name is ever deleted. Names
are relative, with `/`: of files, and of folders that `write_folder` made, which have a manifest of their own.
"""

import json
from pathlib import Path

import topwork
from topwork.common.errors import RunError
from topwork.common.files import write_json

RUN = "run.json"
FORMAT = 1


def is_run(folder: Path) -> bool:
    """Whether a run was begun in this folder."""
    return (folder / RUN).is_file()


def own(folder: Path, *names: str) -> None:
    """Write down that these files and folders are the run's, before they are written: what is named and is not there
    does no harm, what is there and not named would never go."""
    known = owned(folder)
    if set(names) <= set(known) and is_run(folder):
        return
    write_json(folder / RUN, {"format": FORMAT, "topwork": topwork.__version__, "files": sorted({*known, *names})})


def owned(folder: Path) -> list[str]:
    """What is the run's. Raises RunError for a list that cannot be read."""
    if not is_run(folder):
        return []
    try:
        files = json.loads((folder / RUN).read_text("utf-8"))["files"]
        return [str(name) for name in files]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder / RUN} is damaged ({error}); bring back a copy of it, or name another folder"
        ) from error
