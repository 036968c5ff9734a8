"""Who holds a folder, written down; and a file that is a lock by being there, for where the system has no locks.

Such a file counts for nothing once its process is gone: told by host, process id, and when the process started.
"""

import json
import os
import secrets
import shlex
import socket
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any


class HeldElsewhereError(Exception):
    """By whom, where that is known by now."""


def claim(path: Path, who: dict[str, Any]) -> None:
    """Put a file with our name at `path`, where none stands whose process lives. Raises HeldElsewhereError."""
    mine = path.with_name(f"{path.name}-{secrets.token_hex(4)}")
    mine.write_text(json.dumps(who), "utf-8")
    try:
        while not _linked(mine, path):
            known = read(path)
            if known is None and not path.exists():
                continue
            if known is None or lives(known):
                by = told(known) if known is not None else "another process"
                raise HeldElsewhereError(f"{by} (where no such process is left, delete {path})")
            _take_away(path, known, mine.with_name(f"{mine.name}-gone"))
    finally:
        mine.unlink(missing_ok=True)


def _take_away(path: Path, known: dict[str, Any], gone: Path) -> None:
    """What a process left that is no more, unless another was faster and it is that one's by now."""
    with suppress(FileNotFoundError):
        os.rename(path, gone)
        if read(gone) != known:
            _linked(gone, path)
        gone.unlink()


def _linked(mine: Path, path: Path) -> bool:
    """Put it there, whole and only where nothing is."""
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    except OSError:  # no hard links there
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with open(descriptor, "wb") as file:
            file.write(mine.read_bytes())
    return True


def me() -> dict[str, Any]:
    """This process."""
    called = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    program = "topwork" if called == "__main__.py" else called
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": shlex.join([program, *sys.argv[1:]]),
        "process_start": _process_start(os.getpid()),
    }


def read(path: Path) -> dict[str, Any] | None:
    """Who a file names; None where there is none, or it is not whole."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"pid", "host", "started"} <= found.keys() else None


def told(known: dict[str, Any]) -> str:
    """In words."""
    command = f" ({known['command']})" if known.get("command") else ""
    return f"process {known['pid']} on {known['host']} since {known['started']}{command}"


def lives(known: dict[str, Any]) -> bool:
    """Whether the process is there, as far as can be told from here."""
    if known["host"] != socket.gethostname() or os.name != "posix":
        return True
    try:
        os.kill(int(known["pid"]), 0)
    except (ProcessLookupError, ValueError, OverflowError, TypeError):
        return False
    except OSError:
        pass  # another user's
    now = _process_start(int(known["pid"]))
    return now is None or known.get("process_start") in (None, now)


def _process_start(process: int) -> int | None:
    """When it started, in the system's ticks, so that a number that was given again is seen; Linux alone tells."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
