"""Where Topwork keeps what it can make again: compiled kernels, converted models, copies of rows."""

import os
import tempfile
from pathlib import Path

from topwork.common.errors import RunError
from topwork.common.os_errors import sentence

CACHE = "TOPWORK_CACHE"
"""Set in the environment to keep it in another folder than ~/.cache/topwork."""


def cache_root() -> Path:
    """`$TOPWORK_CACHE`, or ~/.cache/topwork; where no home is known, a folder of this user's for temporary files."""
    given = os.environ.get(CACHE)
    try:
        return Path(given or "~/.cache/topwork").expanduser()
    except RuntimeError:  # no HOME, and a user without an entry: containers have such
        return Path(given) if given else temporary_root()


def temporary_root() -> Path:
    """A folder below the system's temporary one that is this user's alone: what lies in it may be run. The same for
    each process of the user, or a new one where that name is another's."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    place = Path(tempfile.gettempdir()) / f"topwork-{user}"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
        own = not hasattr(os, "getuid") or (found.st_uid == user and not found.st_mode & 0o022)
        if own and not place.is_symlink() and os.access(place, os.W_OK | os.X_OK):
            return place
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="topwork-"))


def make_cache(folder: Path) -> None:
    """Make a folder in the cache. Raises RunError that names TOPWORK_CACHE where it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise RunError(f"{sentence(error, folder)}. {advice()}") from error


def advice() -> str:
    """How the cache is put elsewhere."""
    return f"Set {CACHE} to a folder that may be written: export {CACHE}=/path/to/folder"
