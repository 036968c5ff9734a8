"""What of a folder is a run's own: RUN/run.json lists it, and only Topwork writes that file.

A run is recognised by it, whatever else lies in the folder, and nothing that it does not name is ever deleted. Names
are relative, with `/`: of files, and of folders that `write_folder` made, which have a manifest of their own.
"""

import json
from pathlib import Path
from typing import Any

import topwork
from topwork.common.errors import RequestError, RunError
from topwork.common.files import write_json

RUN = "run.json"
FORMAT = 1
_OLD_RUN = ("recipe.yaml", "provenance.json")


def is_run(folder: Path) -> bool:
    """Whether a run was begun in this folder, by this version of Topwork or an earlier one."""
    return is_listed(folder) or is_old_run(folder)


def is_listed(folder: Path) -> bool:
    """Whether a run was begun here that has a list of its files. A run.json that is not JSON was once ours; one of
    another tool's is none."""
    try:
        return _is_ours(json.loads((folder / RUN).read_text("utf-8")))
    except ValueError:
        return True
    except OSError:
        return False


def is_old_run(folder: Path) -> bool:
    """Whether a Topwork that kept no list of its files began a run here."""
    return not is_listed(folder) and all((folder / name).is_file() for name in _OLD_RUN)


def own(folder: Path, *names: str) -> None:
    """Write down that these files and folders are the run's, before they are written: what is named and is not there
    does no harm, what is there and not named would never go. Raises RequestError where run.json is another tool's."""
    known = owned(folder)
    if set(names) <= set(known) and is_listed(folder):
        return
    if (folder / RUN).exists() and not is_listed(folder):
        raise RequestError(f"{folder / RUN} is not Topwork's, which keeps a list of a run's files there; move it away")
    write_json(folder / RUN, {"format": FORMAT, "topwork": topwork.__version__, "files": sorted({*known, *names})})


def owned(folder: Path) -> list[str]:
    """What is the run's; nothing where there is no list. Raises RunError for one that cannot be read."""
    if not is_listed(folder):
        return []
    try:
        files = json.loads((folder / RUN).read_text("utf-8"))["files"]
        return [str(name) for name in files]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder / RUN} is damaged ({error}); bring back a copy of it, or name another folder"
        ) from error


def _is_ours(value: Any) -> bool:
    return isinstance(value, dict) and {"format", "topwork", "files"} <= value.keys()
