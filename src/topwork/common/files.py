"""Files and folders that appear whole or not at all, and say what is in them.

What is written stands aside under a hidden name, is fsynced, and is renamed over its target; the folder that holds it
is fsynced after. A process killed at any moment leaves the old content, the new content, or (for a folder being
replaced) the old one aside, from where `recover_folder` brings it back. One writer per target.
"""

import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topwork.common.errors import CheckpointError, RunError

MANIFEST = "manifest.json"
_NEW = ".topwork-new-"
_OLD = ".topwork-old-"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def sha256_bytes(data: bytes) -> str:
    """The SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path`, whole or not at all. Raises RunError where the disk is full; the old file then stands."""
    path = path.resolve()  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    with _disk_full_explained(path):
        try:
            with open(aside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _fsync(path.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """For a writer that needs a path of its own: gives one aside, and puts what was written there at `path`, whole or
    not at all. Raises RunError where the disk is full; what a killed process left of `path` is cleared first."""
    path = path.resolve()  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent, path.name)
    aside = _aside(path)
    with _disk_full_explained(path):
        try:
            yield aside
            _fsync(aside)
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text, as UTF-8 with the line ends it has."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_text` for a JSON value: sorted keys, two spaces, strict (ValueError on NaN and infinity)."""
    write_text(path, _json(value))


def append_line(file: io.FileIO, line: str) -> None:
    """Append one line with one system call to a file opened with `open(path, "ab", buffering=0)`.

    A killed process so leaves whole lines, at worst a torn last one. Raises RunError where the disk is full.
    """
    rest = memoryview(f"{line}\n".encode())
    with _disk_full_explained(Path(str(file.name))):
        while rest:  # a second turn only after a short write, which a full disk explains
            rest = rest[file.write(rest) :]


def write_folder(target: Path, write: Callable[[Path], None], replace: bool = False) -> None:
    """Let `write` fill a fresh folder, add checksums of its files, and put it at `target` whole or not at all.

    Refuses a `target` that holds something, unless `replace`. Raises RunError for that and for a full disk; on any
    failure the new folder is removed and the old one stands. What a killed process left of `target` is cleared first.
    """
    target = target.resolve()  # a link stays a link
    target.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(target)
    clear_leftovers(target.parent, target.name)
    if target.exists() and (not target.is_dir() or (not replace and any(target.iterdir()))):
        raise RunError(f"{target} exists already and would be overwritten; name another folder or remove it first")
    aside = _aside(target)
    with _disk_full_explained(target):
        try:
            aside.mkdir()
            write(aside)
            _seal(aside)
            _swap_in(aside, target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            recover_folder(target)
            raise
        _fsync(target.parent)
        recover_folder(target)


def recover_folder(target: Path) -> None:
    """Finish a replacement of `target`, by a killed process too: the old folder goes, or comes back if none stands."""
    target = target.resolve()
    old = target.with_name(f"{_OLD}{target.name}")
    if not old.exists():
        return
    if target.exists():
        _discard(old, _aside(target))
    else:
        os.rename(old, target)
        _fsync(target.parent)


def recover_folders(folder: Path) -> None:
    """`recover_folder` for every folder in `folder` that was being replaced."""
    for old in folder.glob(f"{_OLD}*"):
        recover_folder(folder / old.name.removeprefix(_OLD))


def remove_folder(path: Path) -> None:
    """Delete a folder so that it disappears at once: a killed process leaves no half of it under its name."""
    _discard(path, _aside(path))


def _discard(path: Path, aside: Path) -> None:
    os.rename(path, aside)
    _fsync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left half written in `folder`: of the target `name`, or of every target.

    Only for a folder that no other process writes to.
    """
    for path in folder.glob(f"{_NEW}*"):
        if name is None or path.name.removeprefix(_NEW).rpartition("-")[0] == name:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def verify_folder(path: Path, but: Collection[str] = ()) -> None:
    """Check a folder of `write_folder` against its manifest, `but` for files that may be edited; CheckpointError names
    the first file that is not whole."""
    for name, entry in sorted(_manifest(path).items()):
        if name in but:
            continue
        file = path / name
        if not file.is_file():
            _not_whole(path, f"{name} is missing")
        found = file.stat().st_size
        if found < entry["bytes"]:
            _not_whole(path, f"{name} is truncated ({found} of {entry['bytes']} bytes)")
        if found > entry["bytes"] or sha256_file(file) != entry["sha256"]:
            _not_whole(path, f"{name} was altered after it was written")


def manifest_names(path: Path) -> list[str]:
    """The files that a folder's manifest names, relative to it. Raises CheckpointError where it cannot be read."""
    return sorted(_manifest(path))


def _not_whole(path: Path, what: str) -> None:
    raise CheckpointError(f"{path} is not whole: {what}; use another copy or an earlier checkpoint")


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """{relative name: {"sha256": hexadecimal, "bytes": size}} of a written folder."""
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        return {
            str(name): {"sha256": str(entry["sha256"]), "bytes": int(entry["bytes"])} for name, entry in files.items()
        }
    except OSError as error:
        raise CheckpointError(
            f"{path} is not whole: {MANIFEST} is missing or cannot be read ({error.strerror})"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not whole: {MANIFEST} is damaged ({error})") from error


def _seal(folder: Path) -> None:
    """Write the manifest of a filled folder, and fsync every file and every directory in it."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            entries[path.relative_to(folder).as_posix()] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    (folder / MANIFEST).write_bytes(_json({"files": entries}).encode())
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _fsync(Path(root, name))
        _fsync(Path(root))


def _swap_in(new: Path, target: Path) -> None:
    """Rename `new` to `target`; what stands there goes aside, and `recover_folder` ends it either way."""
    if target.exists():
        os.rename(target, target.with_name(f"{_OLD}{target.name}"))
    os.rename(new, target)


def _aside(path: Path) -> Path:
    """A fresh hidden sibling. The random end keeps two writers of different processes apart."""
    return path.with_name(f"{_NEW}{path.name}-{secrets.token_hex(4)}")


def _fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise  # some mounted drives cannot fsync a directory, which is no failure of the write
    finally:
        os.close(handle)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def _disk_full_explained(path: Path) -> Iterator[None]:
    """Turn "no space left on device" into a RunError that says where, how much is free and what to do."""
    try:
        yield
    except Exception as error:
        if _error_number(error) not in _DISK_FULL:
            raise
        free_bytes = shutil.disk_usage(path.parent).free
        raise RunError(
            f"the disk is full: {path} could not be written ({free_bytes / 2**20:.1f} MiB are free or left of the "
            "quota there); free some space or write to another disk (a training: output_dir), then run it again (a "
            "training: with --resume). Nothing that was saved before is lost"
        ) from error


def _error_number(error: Exception) -> int | None:
    """The errno of an OSError, or the one that a library in Rust (safetensors) names in its message."""
    if isinstance(error, OSError):
        return error.errno
    named = re.search(r"\(os error (\d+)\)", str(error))
    return int(named.group(1)) if named else None
