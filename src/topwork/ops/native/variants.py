"""How a kernel's file may be compiled for this machine, the best way first.

With AMX where the processor has it and the file can use it (it includes amx.h), for this processor without AMX, and as
any processor of its kind would take it. Which of them is used is decided by proof (`proof.py`).
"""

import ctypes
import os
import platform
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from topwork.common.errors import RequestError

MARCH = "TOPWORK_MARCH"
"""Set in the environment to compile for another processor than this one, as gcc's -march names it: `x86-64-v3`."""
AMX = "TOPWORK_AMX"
"""Set in the environment to `off` to do without the processor's AMX; `emulated` is for tests, and slow."""
AMX_WAYS = ("off", "emulated")
TILES = "amx.h"
"""A file that includes it, on whatever way, has a use for AMX."""

_NEEDED = {"amx_tile", "amx_bf16", "avx512_bf16"}
_INCLUDED = re.compile(rb'^#include "([\w.]+)"', re.MULTILINE)
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
"""x86-64's number of the call, and what amx.h asks with."""


class Variant(NamedTuple):
    """A way to compile.

    name   as it is told, behind "compiled"
    flags  of the compiler, beside those that all ways have
    amx    whether the operating system is asked for AMX's registers
    """

    name: str
    flags: tuple[str, ...]
    amx: bool = False


def variants(name: str) -> list[Variant]:
    """The ways in which NAME.c is tried. Raises RequestError where TOPWORK_AMX says what nobody knows."""
    asked, march = amx_asked(), os.environ.get(MARCH)
    tiles = TILES in sources(name)
    without = ("-DNO_AMX",) if tiles else ()
    here = f"-march={march or 'native'}"
    if tiles and asked == "emulated":
        best = [Variant("with AMX emulated", (here, "-DEMULATE_AMX"))]
    elif tiles and asked is None and has_amx():
        best = [Variant("for AMX", (here,), amx=True)]
    else:
        best = []
    if march:
        own = Variant(f"for {march}", (here, *without))
        return [found._replace(name=f"for {march}") for found in best if not found.amx or not amx_refusal()] or [own]
    plain = ("-march=x86-64",) if is_x86() else ()
    return [
        *best,
        Variant("for this processor without AMX" if tiles else "for this processor", (here, *without)),
        Variant("for any x86-64 processor" if is_x86() else "for any processor of this kind", (*plain, *without)),
    ]


def amx_asked() -> str | None:
    """What TOPWORK_AMX says, None for nothing. Raises RequestError for what it does not know."""
    asked = os.environ.get(AMX) or None
    if asked not in (None, *AMX_WAYS):
        raise RequestError(
            f"{AMX} is {asked!r}, expected {' or '.join(AMX_WAYS)}; unset it to use AMX where the processor has it"
        )
    return asked


def sources(name: str) -> dict[str, bytes]:
    """NAME.c and all that it includes of ours, by file name."""
    found: dict[str, bytes] = {}
    wanted = [f"{name}.c"]
    while wanted:
        file = wanted.pop()
        if file not in found:
            found[file] = (files("topwork.ops.native") / file).read_bytes()
            wanted += [included.decode() for included in _INCLUDED.findall(found[file])]
    return dict(sorted(found.items()))


def compiler() -> str:
    """The C compiler's command: what CC says, or the first that is here; a CC of spaces says nothing. Raises OSError
    where there is none."""
    found = os.environ.get("CC", "").strip() or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None:
        raise OSError("no C compiler was found")
    return found


def processor() -> bytes:
    """What this processor can do: a cache that moves to another one must not be loaded there."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features"))).encode()
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}".encode()


def is_x86() -> bool:
    """Whether the processor is a 64-bit one of Intel's kind."""
    return platform.machine().lower() in ("x86_64", "amd64")


def has_amx() -> bool:
    """Whether the processor has what amx.h needs."""
    return is_x86() and set(processor().decode().split()) >= _NEEDED


def amx_refusal() -> str:
    """Why the operating system does not let this process use AMX; an empty string where it does. On Linux a process
    asks for the registers' 8 KiB; to ask again is harmless."""
    try:
        call = ctypes.CDLL(None, use_errno=True).syscall
        call.argtypes, call.restype = [ctypes.c_long] * 3, ctypes.c_long
        refused = call(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    except (OSError, AttributeError, TypeError) as error:
        return str(error)
    return os.strerror(ctypes.get_errno()) if refused else ""
