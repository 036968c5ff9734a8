"""The C kernels: compiled once for this machine's processor, kept in the cache, loaded with ctypes.

No torch headers: a kernel takes pointers and sizes, builds in a second and outlives torch versions. OpenMP is the one
runtime that torch has loaded already (same name, so the loader shares it): a second pool of threads would fight the
first. Without a compiler everything still runs on plain torch, slower, and says so once.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from topwork.common.cache import CACHE, advice, cache_root, temporary_root
from topwork.common.os_errors import why

FLAGS = ("-O3", "-ffp-contract=off", "-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-Wall")
"""No fused multiply-add by contraction: a product and a sum are rounded as in the plain-torch truth."""
HEADERS = ("simd.h", "amx.h", "tile.h", "grouped_amx.h", "rows.h", "packed4.h", "product.h", "paged.h", "pool.h")
"""What the kernels include."""
OFF = "TOPWORK_NO_NATIVE"
"""Set in the environment to run on plain torch alone."""
MARCH = "TOPWORK_MARCH"
"""Set in the environment to compile for another processor than this one, as gcc's -march names it: `x86-64-v3`."""
TOLD: set[str] = set()
"""Warnings that this process has had."""


def load(name: str) -> ctypes.CDLL | None:
    """The library of `native/NAME.c`, from the cache; where that cannot be written or run from, from a folder for
    temporary files, with a warning. None, and a warning, where it cannot be compiled or loaded at all."""
    if os.environ.get(OFF):
        return None
    try:
        return _kept(name)
    except (OSError, subprocess.SubprocessError) as error:
        _tell(
            "none",
            "the C kernels are not to be had here, so plain torch does their work, several times slower: "
            f"{_told(error)}. Install a C compiler (gcc or clang) and set {CACHE} to a folder that may be written and "
            f"run from, or set {OFF}=1 to be told no more",
        )
        return None


def _kept(name: str) -> ctypes.CDLL:
    _compiler()
    folder = cache_root() / "native"
    try:
        return _loaded(name, folder)
    except (OSError, subprocess.SubprocessError) as error:
        instead = temporary_root() / "native"
        library = _loaded(name, instead)
        _tell(
            "elsewhere", f"the C kernels cannot be kept in {folder} ({_told(error)}) and are in {instead}. {advice()}"
        )
        return library


def _loaded(name: str, folder: Path) -> ctypes.CDLL:
    target = _path(name, folder)
    if target.exists():
        with suppress(OSError):  # cut short by a full disk, say: made again
            return ctypes.CDLL(str(target))
    _build(name, target)
    return ctypes.CDLL(str(target))


def _told(error: Exception) -> str:
    told = error.stderr if isinstance(error, subprocess.CalledProcessError) else why(error)
    return " ".join(told.split())[-300:]


def _tell(kind: str, what: str) -> None:
    """Once for each kind of reason, not for each library."""
    if kind not in TOLD:
        TOLD.add(kind)
        warnings.warn(what, RuntimeWarning, stacklevel=4)


def _path(name: str, folder: Path) -> Path:
    made_of = [*_sources(name).values(), _compiler().encode(), " ".join(_flags()).encode(), _processor()]
    key = hashlib.sha256(b"\0".join(made_of)).hexdigest()
    return folder / f"{name}-{key[:16]}.so"


def _build(name: str, target: Path) -> None:
    """Compile aside and move, so that two processes cannot disturb each other."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        written, built = Path(work) / f"{name}.c", Path(work) / f"{name}.so"
        for file, source in _sources(name).items():
            (Path(work) / file).write_bytes(source)
        print(f"compiling C kernels for this processor, once: {name}.c ...", file=sys.stderr, flush=True)
        subprocess.run(
            [*_compiler().split(), *_flags(), str(written), "-o", str(built), "-lm"],
            check=True, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        built.replace(target)


def _sources(name: str) -> dict[str, bytes]:
    return {file: (files("topwork.ops.native") / file).read_bytes() for file in (f"{name}.c", *HEADERS)}


def _compiler() -> str:
    found = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None:
        raise OSError("no C compiler was found")
    return found


def _flags() -> tuple[str, ...]:
    return (f"-march={os.environ.get(MARCH) or 'native'}", *FLAGS)


def _processor() -> bytes:
    """What this processor can do: a cache that moves to another one must not be loaded there."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features"))).encode()
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}".encode()
