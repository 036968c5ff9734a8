"""What of a folder is a run's own: RUN/run.json lists it, and only Topwork writes that file.

A run is recognised by it, whatever else lies in the folder, and nothing that it does not name is ever deleted. Names
are relative, with `/`: of files, and of folders that `write_folder` made, which have a manifest of their own.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

import topwork
from topwork.common.errors import CheckpointError, RequestError
from topwork.common.files import MANIFEST, manifest_names, remove_folder, write_json
from topwork.common.locks import briefly

RUN = "run.json"
FORMAT = 1
_RECIPE, _PROVENANCE = "recipe.yaml", "provenance.json"


def is_run(folder: Path) -> bool:
    """Whether a run was begun in this folder, by this version of Topwork or an earlier one."""
    return is_listed(folder) or is_old_run(folder)


def is_listed(folder: Path) -> bool:
    """Whether a run was begun here that has a list of its files."""
    return _list(folder) is not None


def is_old_run(folder: Path) -> bool:
    """Whether a run was begun here whose list is lost, or by a Topwork that kept none."""
    return not is_listed(folder) and (folder / _RECIPE).is_file() and _is_provenance(folder / _PROVENANCE)


def begin_list(folder: Path, *names: str) -> None:
    """Make the folder a run's, which owns these."""
    _write(folder, names)


def refuse_other_list(folder: Path) -> None:
    """Raises RequestError where a run.json would be replaced that is not Topwork's, or cannot be read."""
    if (folder / RUN).exists() and not is_listed(folder):
        raise RequestError(
            f"{folder / RUN} is damaged or another tool's; Topwork keeps the list of a run's files there. Move it away"
        )


def own(folder: Path, *names: str) -> None:
    """Write down that these files and folders are the run's, before they are written: what is named and is not there
    does no harm, what is there and not named would never go. Nothing happens in a folder without a list."""
    if set(names) <= set(owned(folder)):
        return
    with briefly(folder):  # an evaluation may write while the run trains
        if is_listed(folder):
            _write(folder, {*owned(folder), *names})


def owned(folder: Path) -> list[str]:
    """What is the run's; nothing where there is no list."""
    return _list(folder) or []


def foreign_in(folder: Path, name: str) -> list[str]:
    """What lies in a folder that the run owns by `name`, and its manifest does not name. Raises RequestError where the
    manifest cannot be read."""
    inside = sorted(path for path in (folder / name).rglob("*") if not path.is_dir() or path.is_symlink())
    if not inside:
        return []
    try:
        known = {*manifest_names(folder / name), MANIFEST}
    except CheckpointError as error:
        raise RequestError(
            f"{error}. What in there is the run's cannot be told, so nothing was deleted: move {folder / name} away"
        ) from error
    return [file for path in inside if (file := path.relative_to(folder / name).as_posix()) not in known]


def delete_owned(folder: Path, but: tuple[str, ...] = ()) -> None:
    """Delete what is the run's, `but` for names that will be replaced, and folders that nothing is left in. What a
    folder holds beside its manifest's files is to be looked for before (`foreign_in`)."""
    for name in (name for name in owned(folder) if name not in but):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)
        for parent in PurePosixPath(name).parents[:-1]:
            with suppress(OSError):
                (folder / parent).rmdir()


def nothing_begun(folder: Path, kind: str = "run", is_kind: Callable[[Path], bool] = is_run) -> RequestError:
    """That there is nothing to go on with, and which folder may have been meant."""
    what = f"holds no {kind}" if folder.is_dir() else "is not there"
    near = _near(folder, is_kind)
    return RequestError(f"{folder} {what}, so there is nothing to go on with (leave --resume out to begin){near}")


def _near(folder: Path, is_kind: Callable[[Path], bool]) -> str:
    """One in it; or else the one beside it whose name is nearest, or that is the only one."""
    if folder.name in ("", ".."):  # its parent as it is written is not the folder that it lies in
        folder = folder.resolve()
    try:
        inside = [path for path in sorted(folder.iterdir()) if is_kind(path)] if folder.is_dir() else []
        if inside:
            return f"; did you mean {inside[0]}{', or another in there' if len(inside) > 1 else ''}?"
        beside = [path for path in folder.absolute().parent.iterdir() if path.is_dir() and is_kind(path)]
    except OSError:
        return ""
    names = [path.name for path in beside if path.name != folder.name]
    near = get_close_matches(folder.name, names, n=1, cutoff=0.5) or (names if len(names) == 1 else [])
    return f"; did you mean {folder.parent / near[0]}?" if near else ""


def take_away(folder: Path) -> bool:
    """Delete what is the run's; True where nothing is left. Beside files of its owner its list stays, which names
    nothing any more, so that a run may begin there again."""
    delete_owned(folder)
    if any(path.name != RUN and not path.name.startswith(".") for path in folder.iterdir()):
        _write(folder, ())
        return False
    (folder / RUN).unlink(missing_ok=True)
    return True


def _write(folder: Path, names: Any) -> None:
    write_json(folder / RUN, {"format": FORMAT, "topwork": topwork.__version__, "files": sorted(set(names))})


def _list(folder: Path) -> list[str] | None:
    """The names in run.json; None where there is none, or what is there is damaged, another tool's, or leads out of the
    folder."""
    try:
        found = json.loads((folder / RUN).read_text("utf-8"))
        names = [str(name) for name in found["files"]] if {"format", "topwork"} <= found.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return names if names is not None and all(map(_is_inside, names)) else None


def _is_provenance(file: Path) -> bool:
    """One that cannot be read may have been."""
    try:
        return {"base", "template_sha256"} <= json.loads(file.read_text("utf-8")).keys()
    except ValueError:
        return True
    except (OSError, AttributeError):
        return False


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name
