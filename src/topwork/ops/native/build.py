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
from functools import cache
from importlib.resources import files
from pathlib import Path

FLAGS = ("-O3", "-ffp-contract=off", "-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-Wall")
"""No fused multiply-add by contraction: a product and a sum are rounded as in the plain-torch truth."""
HEADERS = ("simd.h", "tile.h", "rows.h", "packed4.h", "product.h", "paged.h", "pool.h")
"""What the kernels include."""
OFF = "TOPWORK_NO_NATIVE"
"""Set in the environment to run on plain torch alone."""
MARCH = "TOPWORK_MARCH"
"""Set in the environment to compile for another processor than this one, as gcc's -march names it: `x86-64-v3`."""


def load(name: str) -> ctypes.CDLL | None:
    """The library of `native/NAME.c`; None, and a warning, where it cannot be compiled or loaded."""
    if os.environ.get(OFF):
        return None
    try:
        return ctypes.CDLL(str(_built(name)))
    except (OSError, subprocess.SubprocessError) as error:
        _tell(error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error))
        return None


@cache
def _tell(why: str) -> None:
    """Once for each reason, not for each library."""
    warnings.warn(
        f"the C kernels are not to be had here, so plain torch does their work, several times slower: {why}. Install "
        f"a C compiler (gcc or clang), or set {OFF}=1 to be told no more",
        RuntimeWarning,
        stacklevel=3,
    )


def _built(name: str) -> Path:
    """The library's path; compiled aside and moved, so that two processes cannot disturb each other."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise OSError("no C compiler was found")
    sources = {file: (files("topwork.ops.native") / file).read_bytes() for file in (f"{name}.c", *HEADERS)}
    flags = (f"-march={os.environ.get(MARCH) or 'native'}", *FLAGS)
    made_of = [*sources.values(), compiler.encode(), " ".join(flags).encode(), _processor()]
    key = hashlib.sha256(b"\0".join(made_of)).hexdigest()
    folder = Path(os.environ.get("TOPWORK_CACHE") or "~/.cache/topwork").expanduser() / "native"
    target = folder / f"{name}-{key[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            written, built = Path(work) / f"{name}.c", Path(work) / f"{name}.so"
            for file, source in sources.items():
                (Path(work) / file).write_bytes(source)
            print(f"compiling C kernels for this processor, once: {name}.c ...", file=sys.stderr, flush=True)
            subprocess.run(
                [*compiler.split(), *flags, str(written), "-o", str(built), "-lm"],
                check=True, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            built.replace(target)
    return target


def _processor() -> bytes:
    """What this processor can do: a cache that moves to another one must not be loaded there."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features"))).encode()
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}".encode()
