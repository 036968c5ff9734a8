"""What the operating system refuses, in one sentence: which path, why, and what to do.

    with explained():                      # around what is only read or made ready: a wrong request
    with explained(path, started=True):    # around work that has begun: it failed on its way

Either raises a TopworkError that is also the error it stands for, so that `except PermissionError` keeps working.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError, RunError, TopworkError, shortened

ASIDE = ".topwork-new-"
"""How the hidden names begin of what is being written (`common/files.py`)."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_ALWAYS_WRITING = (*DISK_FULL, errno.EROFS, errno.EFBIG, getattr(errno, "ETXTBSY", errno.EROFS))
_WRONG_PLACE = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS,
    errno.EEXIST, errno.ENOTEMPTY,
)  # fmt: skip
"""Another path would have been answered: the request was wrong, as long as nothing was begun."""
_NETWORK = (
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.ENOTCONN,
)  # fmt: skip
_NETWORK_KINDS = {"gaierror", "herror", "SSLError"}
"""Their numbers are of other lists, in which 1 is no EPERM."""
_IN_RUST = re.compile(r"\(os error (\d+)\)")
_QUOTED = re.compile(r"""["'`](/[^"'`]+)["'`]""")
_NOT_THERE = "No such file or directory: "
_IN_CIRCLES = "Symlink loop from "


@contextmanager
def explained(path: Path | str | None = None, started: bool = False) -> Iterator[None]:
    """Turn what the operating system refuses within into a TopworkError that is an OSError of the same kind. `path` is
    what is worked on, where the error names none; `started` says that something was begun or written already."""
    try:
        yield
    except TopworkError:
        raise
    except Exception as error:
        found = os_error_in(error)
        if found is None or found.errno in (None, errno.EPIPE, errno.EINTR):
            raise
        raise as_topwork(found, path, started) from error


def check_link(path: Path) -> None:
    """Raises RequestError for a link that points to nothing, or back to itself: `exists` takes it for no file. A name
    that no disk takes is no link, and may be no path at all."""
    with explained(path):
        try:
            is_link = path.is_symlink()
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return
        if is_link:
            path.stat()


def os_error_in(error: BaseException) -> OSError | None:
    """The operating system's error that this one is, that it names as libraries in Rust do (`(os error 13)`), or that
    it was raised from. One without a number is a library's own, of a network for example."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    named, text = _IN_RUST.search(str(error)), str(error)
    if named is not None:
        quoted = _QUOTED.search(text)
        return OSError(int(named.group(1)), os.strerror(int(named.group(1))), quoted and quoted.group(1))
    if isinstance(error, RuntimeError) and text.startswith(_IN_CIRCLES):  # pathlib, before Python 3.13
        return OSError(errno.ELOOP, os.strerror(errno.ELOOP), text.removeprefix(_IN_CIRCLES).strip("'\""))
    if isinstance(error, FileNotFoundError) and text.startswith(_NOT_THERE):  # safetensors, without a number
        return OSError(errno.ENOENT, os.strerror(errno.ENOENT), text.removeprefix(_NOT_THERE).strip("\"'"))
    cause = error.__cause__ or (error.__context__ if isinstance(error, OSError) else None)
    found = os_error_in(cause) if cause is not None else None
    return found or (error if isinstance(error, OSError) else None)


def as_topwork(error: OSError, path: Path | str | None = None, started: bool = False) -> TopworkError:
    """The error as Topwork's own: RequestError where another path would have done and nothing was begun."""
    wrong = not started and error.errno in _WRONG_PLACE and not _of_network(error)
    kind = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    made = _made(RequestError if wrong else RunError, kind)
    return made(error.errno, error.strerror, _name(error, path), sentence(error, path))


def _made(base: type[TopworkError], kind: type[OSError]) -> type[TopworkError]:
    """The class that is both, made once."""

    def begin(self: Any, number: int, reason: str, name: str | None, text: str) -> None:
        kind.__init__(self, number, reason, *([] if name is None else [name]))
        self.text = text

    if (base, kind) not in _MADE:
        members = {
            "__init__": begin,
            "__str__": lambda self: self.text,
            "__reduce__": lambda self: (_again, (base, kind, self.errno, self.strerror, self.filename, self.text)),
            "__module__": __name__,
        }
        _MADE[base, kind] = type(f"{base.__name__.removesuffix('Error')}{kind.__name__}", (base, kind), members)
    return _MADE[base, kind]


_MADE: dict[tuple[type[TopworkError], type[OSError]], type[TopworkError]] = {}


def _again(base: type[TopworkError], kind: type[OSError], *values: Any) -> TopworkError:
    return _made(base, kind)(*values)


def sentence(error: OSError, path: Path | str | None = None) -> str:
    """Which path, why, and what to do."""
    if _of_network(error):
        return f"the network: {error.strerror or error}; look to it, or to a proxy, then run it again"
    name = _name(error, path)
    in_hub = name is not None and "huggingface" in Path(name).parts
    return _sentence(error, name) + (", or set HF_HOME to a folder that may be written" if in_hub else "")


def _of_network(error: OSError) -> bool:
    """Whether it tells of a connection, and of no file. A network's disk names one."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & _NETWORK_KINDS) or (error.filename is None and error.errno in _NETWORK)


def _sentence(error: OSError, name: str | None) -> str:
    if error.errno is None:
        return f"{str(error).strip() or type(error).__name__}; look at that place or the network, or name another"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return (
            f"{name or 'a file'} could not be opened: as many files are open as this process may have; allow it more "
            "(ulimit -n 65536), then run it again"
        )
    if name is None:
        return f"a file could not be read or written: {_REASONS.get(error.errno) or f'{error.strerror}; {_AGAIN}'}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return _forbidden(Path(name), _writing(error, name))
    if error.errno in _FOR_PATHS:
        return _FOR_PATHS[error.errno](Path(name))
    told = _REASONS.get(error.errno)
    return f"{name} could not be {'written' if _writing(error, name) else 'read or written'}: " + (
        told or f"{error.strerror}; look at that place, or name another"
    )


def why(error: BaseException) -> str:
    """The reason alone, for a message that tells its own way out; the text of what is no error of the system."""
    found = os_error_in(error)
    return str(error) if found is None or found.errno is None else sentence(found).partition("; ")[0]


_AGAIN = "look at the disk and at the limits of this process (ulimit -a), then run it again"
_REASONS = {
    errno.EROFS: "its disk can only be read; name a place on another disk",
    errno.EIO: "the disk reports an input/output error; look at it (dmesg), and read from or write to another",
    errno.EFBIG: "it would be larger than a file may be there; raise the limit (ulimit -f), or name another disk",
    errno.ENOMEM: "there is no memory for it; give this process more, or ask for less at once",
    errno.EBUSY: "another program uses it; end that, or name another place",
    errno.ENODEV: "its disk is not there; mount it, or name another place",
    getattr(errno, "ESTALE", -1): "its network disk has lost it (stale file handle); mount that again, then try again",
    getattr(errno, "ETXTBSY", -2): "another program runs it; end that, or name another place",
}


def _missing(path: Path) -> str:
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            lead = "" if place == path else f"{path} cannot be opened: "
            return (
                f"{lead}{place} is a link to {os.readlink(place)}, which is not there; bring that back, set the link "
                "anew, or name another path"
            )
    if path.exists():  # safetensors says so of what it may not read
        return _forbidden(path, False)
    parent = "" if path.parent.exists() else f", nor is its folder {path.parent}"
    start = "" if path.is_absolute() else f" (it starts at {Path.cwd()})"
    return f"{path} is not there{parent}; look at the path{start}, or name another"


def _forbidden(path: Path, writing: bool) -> str:
    nearest = next((place for place in (path, *path.absolute().parents) if os.path.lexists(place)), path)
    above = [*([nearest] if nearest != path else []), *nearest.absolute().parents]
    closed = [place for place in above if not _may(place, os.X_OK)]
    if closed:
        why = f"no permission to enter {closed[-1]}"
    elif writing:
        place = nearest if nearest.is_dir() or not _may(nearest, os.W_OK) else nearest.parent
        return (
            f"{path} cannot be written: {_who()} has no permission for {place}; let its owner allow it (chmod), or "
            "name another place"
        )
    else:
        why = f"no permission for {nearest}"
    return f"{path} cannot be read: {_who()} has {why}; let its owner allow it (chmod), or name another"


def _no_folder(path: Path) -> str:
    file = next((place for place in (path.parent, *path.parent.parents) if place.exists() and not place.is_dir()), path)
    return f"{path} cannot be a path: {file} is a file, and a folder is expected there; name another"


def _in_circles(path: Path) -> str:
    return f"{path} cannot be opened: it is a link that leads back to itself; set it anew, or name another path"


def _too_long(path: Path) -> str:
    longest = max(path.parts, key=len, default="")
    return (
        f"a name of {len(os.fsencode(longest))} bytes is too long for the disk (most take 255, and 4,096 for a whole "
        f"path): {shortened(longest, 60)}; give a shorter one"
    )


def _is_folder(path: Path) -> str:
    return f"{path} is a folder, and a file is expected; name a file, or move the folder away"


def _in_the_way(path: Path) -> str:
    return f"{path} is there already, and in the way; move it away, or name another"


def _full(path: Path) -> str:
    place = next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())
    return (
        f"the disk is full: {path} could not be written ({shutil.disk_usage(place).free / 2**20:.1f} MiB are free or "
        "left of the quota there); free some space or write to another disk (a training: output_dir), then run it "
        "again (a training: with --resume). Nothing that was saved before is lost"
    )


_FOR_PATHS: dict[int, Callable[[Path], str]] = {
    errno.ENOENT: _missing,
    errno.ENOTDIR: _no_folder,
    errno.ELOOP: _in_circles,
    errno.ENAMETOOLONG: _too_long,
    errno.EISDIR: _is_folder,
    errno.EEXIST: _in_the_way,
    errno.ENOTEMPTY: _in_the_way,
    **dict.fromkeys(DISK_FULL, _full),
}


def _name(error: OSError, path: Path | str | None) -> str | None:
    """What the error is about: what it names, but for hidden names, whose target is meant."""
    named = error.filename
    if path is not None and (not isinstance(named, (str, bytes, os.PathLike)) or ASIDE in os.fsdecode(named)):
        named = path
    if not isinstance(named, (str, bytes, os.PathLike)):
        return None
    return re.sub(rf"{re.escape(ASIDE)}([^/\\]*)-[0-9a-f]+", r"\1", os.fsdecode(named))


def _writing(error: OSError, name: str) -> bool:
    """Whether it was to be written: what can be read was not refused for reading."""
    if error.errno in _ALWAYS_WRITING or error.filename2 is not None:
        return True
    if error.errno not in (errno.EACCES, errno.EPERM):
        return False
    return ASIDE in str(error.filename) or not os.path.lexists(name) or _may(name, os.R_OK)


def _may(path: Path | str, way: int) -> bool:
    return os.access(path, way, effective_ids=os.access in os.supports_effective_ids)


def _who() -> str:
    """Who this process is, in a message."""
    try:
        import pwd

        return f"user {pwd.getpwuid(os.geteuid()).pw_name}"
    except (ImportError, KeyError):
        return f"user {os.geteuid()}" if hasattr(os, "geteuid") else "this user"
