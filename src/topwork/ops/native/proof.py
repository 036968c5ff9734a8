"""Whether a compiled kernel is right on this processor: it is tried in a process of its own before it is loaded here.

That process (`prove.py`) loads the library and compares its functions with plain torch. A crash, a hang or a wrong sum
there means that the library is not used. What came out stands in a mark beside the library, so that it is asked once;
a mark holds for one library, one kernel of the operating system (which has to keep AMX's registers), one torch (whose
OpenMP runs the kernels) and one set of trials.
"""

import hashlib
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from topwork.common.cache import temporary_root
from topwork.common.memory import SAID

SECONDS = 60
"""For trials that take a fifth of one. Then the system ends the process, wherever it is."""
PATIENCE_SECONDS = 300.0
"""How long the process may take with importing torch."""
READY = "ready"
"""What it says once torch is there."""
TRIALS = ("prove.py", "trials.py", "trials_decode.py", "trials_decoder.py")
_FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGXCPU")
"""Signals that others send, the system where memory ends: they tell nothing of the kernel."""
_NO_THREADS = "Resource temporarily unavailable"
_CODE = (
    "import json, sys; given = json.loads(sys.stdin.readline()); sys.path[:] = given['path'];"
    "from topwork.ops.native.prove import main; main(given['name'], given['seconds'])"
)


class Verdict(NamedTuple):
    """What became of a library's proof.

    kind  "right"; "refused": it is not to be used; "not loaded": this file cannot be, another may; "untried": there was
          no proof, which says nothing of the library
    why   in words, behind "it"
    """

    kind: str
    why: str = ""


class Mark(NamedTuple):
    """A verdict that was kept. `digest` is of the library, `at` is when, in UTC; `path` where the mark is."""

    right: bool
    why: str
    digest: str
    at: str
    path: Path


class Trial:
    """A process that waits for a library to try."""

    def __init__(self, name: str, off: str) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._why = ""
        try:
            self._process = subprocess.Popen(
                [sys.executable or "python3", "-P", "-W", "ignore", "-c", _CODE],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
                env={**os.environ, off: "1"}, start_new_session=True,
            )  # fmt: skip
            given = {"name": name, "seconds": SECONDS, "path": [place for place in sys.path if isinstance(place, str)]}
            _write(self._process, json.dumps(given))
        except OSError as error:
            self._why = str(error)

    def of(self, library: Path) -> Verdict:
        """What the process says of a library. It ends with that."""
        if self._process is None:
            return Verdict("untried", f"could not be tried ({self._why})")
        try:
            out, err = self._process.communicate(f"{library}\n", timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            return Verdict("untried", f"could not be tried within {PATIENCE_SECONDS:.0f} s")
        return _verdict(self._process.returncode, out.splitlines(), err)

    def end(self) -> None:
        """Whatever became of it."""
        if self._process is None:
            return
        with suppress(OSError):
            self._process.kill()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        self._process.wait()


@contextmanager
def trial(name: str, off: str) -> Iterator[Trial]:
    """A process for NAME.c's library, begun: importing torch takes as long as compiling does. `off` is the variable
    that keeps it from compiling kernels itself."""
    begun = Trial(name, off)
    try:
        yield begun
    finally:
        begun.end()


def _write(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _verdict(code: int, said: list[str], err: str) -> Verdict:
    if code and (SAID.search(err) or _NO_THREADS in err):
        return Verdict("untried", "could not be tried for want of memory or threads")
    if code < 0:
        name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
        if name == "SIGALRM":
            return Verdict("refused", "did not end when it was tried")
        if name in _FROM_OUTSIDE:
            return Verdict("untried", f"could not be tried to the end ({name})")
        return Verdict("refused", f"crashed when it was tried ({name}: {signal.strsignal(-code)})")
    last = " ".join((err.strip().splitlines() or ["it said nothing"])[-1].split())[-200:]
    if READY not in said:
        return Verdict("untried", f"could not be tried ({last})")
    with suppress(ValueError, TypeError):
        told = json.loads(said[-1])
        return Verdict(str(told["kind"]), str(told["why"]))
    return Verdict("refused", f"ended the process that tried it ({last})")


# Marks


def key(asked: str = "", compiler: str = "") -> str:
    """What a proof depends on beside the library; `asked` is what the operating system says of AMX, `compiler` which
    one there is."""
    depends = (platform.release(), _torch(), _trials(), asked, compiler)
    return hashlib.sha256("\0".join(depends).encode()).hexdigest()[:8]


def kept(library: Path, under: str) -> Mark | None:
    """The mark of a library's file, or of one that is not there and was refused; None where there is none that can be
    read and is of this very file."""
    for folder in _folders(library.parent):
        mark = _read(folder / _name(library, under))
        if mark is not None and (mark.digest == _hash(library) or not (mark.right or library.exists())):
            return mark
    return None


def keep(library: Path, under: str, right: bool, why: str) -> Mark:
    """Leave a mark, beside the library or, where that folder cannot be written, among temporary files."""
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    mark = Mark(right, why, _hash(library), at, library.parent / _name(library, under))
    try:
        _write_whole(mark)
    except OSError:
        mark = mark._replace(path=temporary_root() / "native" / mark.path.name)
        with suppress(OSError):
            _write_whole(mark)
    return mark


def _name(library: Path, under: str) -> str:
    return f"{library.stem}-{under}.json"


def _folders(own: Path) -> Iterator[Path]:
    yield own
    if own.exists() and not os.access(own, os.W_OK):
        yield temporary_root() / "native"


def _read(path: Path) -> Mark | None:
    try:
        value: Any = json.loads(path.read_text("utf-8"))
        right, words = value["right"], [value[name] for name in ("why", "digest", "at")]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(right, bool) or not all(isinstance(word, str) for word in words):
        return None
    why, digest, at = words
    return Mark(right, why, digest, at, path)


def _write_whole(mark: Mark) -> None:
    """Aside and moved, so that who reads it meanwhile reads one or the other."""
    path, value = mark.path, {name: field for name, field in mark._asdict().items() if name != "path"}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        aside.write_text(json.dumps(value), "utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _hash(library: Path) -> str:
    """Of a file; of none an empty string."""
    try:
        return hashlib.sha256(library.read_bytes()).hexdigest()
    except OSError:
        return ""


@cache
def _torch() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


@cache
def _trials() -> str:
    return hashlib.sha256(b"".join((files("topwork.ops.native") / file).read_bytes() for file in TRIALS)).hexdigest()
