"""One process at a time in a folder: who comes second is told who holds it, and nothing is touched.

`.topwork-lock` in the folder is locked by the system, so that it is free the moment its holder ends, however it ends;
what stands in the file only tells who that is. Where a file system has no such locks the file `.topwork-holder` is one
itself, and it counts for nothing once its process is gone. Processes forked from the holder do not hold it.
"""

import errno
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError
from topwork.common.holder import HeldElsewhereError, claim, lives, me, read, told

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK, HOLDER = ".topwork-lock", ".topwork-holder"
PATIENCE_SECONDS = 2.0
"""A holder that does not yet say who it is, or is just ending, is waited for so long."""
_SPARE_DESCRIPTORS = 256
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)


@dataclass
class _Lock:
    """A folder that this process holds. `made` are the folders it made for that, the outermost first."""

    folder: Path
    who: dict[str, Any]
    made: list[Path] = field(default_factory=list)
    descriptor: int | None = None


_taken: dict[Path, _Lock] = {}
_guard = threading.Lock()


@contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Hold all of these folders to the end. What is missing is made, and goes again where nothing came into it.

    Raises RequestError where another process, or another thread of this one, holds one of them; it names process, host
    and since when. Locks are taken in one order, so that of two requests for the same folders one goes on.
    """
    given = {Path(folder).resolve(): Path(folder) for folder in folders}
    _allow_open_files(len(given))
    with ExitStack() as held:
        for place in sorted(given):
            lock = _take(place, given[place])
            held.callback(_release, lock)
        yield


def leave(folder: Path) -> None:
    """Let a folder that is held go as it is given back, if nothing is in it by then."""
    with _guard:
        _taken[folder.resolve()].made.append(folder.resolve())


@contextmanager
def briefly(folder: Path) -> Iterator[None]:
    """Wait for the folder itself and hold it for a moment, to read and write a file of it as one. Where the system
    cannot do that it goes on without, and where somebody holds it for longer (`flock RUN topwork …` is one who waits
    for us)."""
    descriptor = None
    try:
        if fcntl is not None:
            with suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY)
                _wait_for(descriptor)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _wait_for(descriptor: int) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD or time.monotonic() > until:
                raise
        time.sleep(0.005)


def _take(folder: Path, called: Path) -> _Lock:
    lock, until = _Lock(folder, me()), time.monotonic() + PATIENCE_SECONDS
    try:
        while True:
            waited = time.monotonic() > until
            try:
                _make(folder, lock.made)
                if _try(lock):
                    return lock
            except FileNotFoundError:  # who made it took it away again
                if waited:
                    raise
            except HeldElsewhereError as error:
                by = str(error) or (_who(folder / LOCK, at_last=True) or "another process" if waited else "")
                if by:
                    raise RequestError(
                        f"{called} is in use by {by}; nothing was touched. Wait until it ends, or name another folder"
                    ) from None
            time.sleep(0.01)
    except BaseException as error:
        _unmake(lock.made)
        if isinstance(error, OSError):
            raise RequestError(f"{called} cannot be used ({error.strerror}); name another folder") from error
        raise


def _try(lock: _Lock) -> bool:
    """Whether it is ours now; False where the file went meanwhile. Raises HeldElsewhereError."""
    with _guard:
        if lock.folder in _taken:
            raise HeldElsewhereError(told(_taken[lock.folder].who))
        try:
            lock.descriptor = _lock_file(lock.folder / LOCK, lock.who)
            if lock.descriptor is None:
                return False
        except NotImplementedError:
            claim(lock.folder / HOLDER, lock.who)
        _taken[lock.folder] = lock
        return True


def _lock_file(path: Path, who: dict[str, Any]) -> int | None:
    """An open and locked file at `path`, or None where it went or became another meanwhile. Raises HeldElsewhereError,
    and NotImplementedError where there are no such locks."""
    descriptor = _open(path)
    try:
        _lock_descriptor(descriptor)
    except OSError as error:
        os.close(descriptor)
        if error.errno in _HELD:
            raise HeldElsewhereError(_who(path)) from None
        if error.errno in _UNSUPPORTED:
            path.unlink(missing_ok=True)
            raise NotImplementedError from None
        raise
    if not _is_at(path, descriptor):
        os.close(descriptor)
        return None
    with suppress(OSError):  # a full disk, or another user's file: it is held all the same
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(who).encode())
    return descriptor


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's
        return os.open(path, os.O_RDONLY)


def _lock_descriptor(descriptor: int) -> None:
    """Raises OSError: one of _HELD, or of _UNSUPPORTED."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    try:
        import msvcrt
    except ImportError:
        raise OSError(errno.ENOTSUP, "no locks") from None
    os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # a locked byte cannot be read, so one far behind the text
    msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    os.lseek(descriptor, 0, os.SEEK_SET)


def _release(lock: _Lock) -> None:
    if os.getpid() != lock.who["pid"]:
        return  # a process forked from the holder
    path = lock.folder / LOCK
    with _guard:
        with suppress(OSError):
            if lock.descriptor is None:
                (lock.folder / HOLDER).unlink()
            elif fcntl is not None and _is_at(path, lock.descriptor):
                path.unlink()  # while it is held, so that nobody holds a file that is nowhere
        if lock.descriptor is not None:
            os.close(lock.descriptor)
            if fcntl is None:
                with suppress(OSError):  # Windows deletes no open file
                    path.unlink()
        _taken.pop(lock.folder, None)
    _unmake(lock.made)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _make(folder: Path, made: list[Path]) -> None:
    """Make the folder, and note which folders had to be made for it."""
    for path in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
        try:
            path.mkdir()
            made.append(path)
        except FileExistsError:
            if not path.is_dir():
                raise


def _unmake(made: Iterable[Path]) -> None:
    for path in reversed(list(made)):
        with suppress(OSError):  # something is in it, or it went
            path.rmdir()


def _who(path: Path, at_last: bool = False) -> str:
    """Who says in the file that it holds it; nothing, but at last, where that one is gone: its next holder is about to
    write its own name there."""
    known = read(path)
    return told(known) if known is not None and (at_last or lives(known)) else ""


def _allow_open_files(count: int) -> None:
    """Each lock is an open file, and a sweep may have a thousand."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _SPARE_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with suppress(OSError, ValueError):
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def _forget() -> None:
    """In a forked process: give back what was copied, so that the lock ends with its holder."""
    global _guard
    _guard = threading.Lock()
    for lock in _taken.values():
        if lock.descriptor is not None:
            with suppress(OSError):
                os.close(lock.descriptor)
    _taken.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
