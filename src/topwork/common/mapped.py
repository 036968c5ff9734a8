"""Letting go of a file's pages that a tensor was read from: they count as the process's memory for as long as the file
is mapped, beside the copy that was made of them."""

import ctypes
import mmap
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

_FILE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)", re.MULTILINE)


def let_go(places: Iterable[tuple[int, int]]) -> None:
    """Give the system back the pages that lie whole between each start and stop (addresses) and hold a file's bytes:
    whoever looks again reads them again. The caller still holds what lies there, and nobody has written to it. Does
    nothing to memory that is no file's, and nothing beyond Linux."""
    release = _madvise()
    if release is None:
        return
    files = _files()
    for start, stop in places:
        for begin, end in files:
            first = -(-max(start, begin) // mmap.PAGESIZE) * mmap.PAGESIZE
            last = min(stop, end) // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                release(first, last - first, mmap.MADV_DONTNEED)


@cache
def _madvise() -> Callable[..., Any] | None:
    if sys.platform != "linux":
        return None
    function: Any = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def _files() -> list[tuple[int, int]]:
    """The addresses at which files are mapped."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
            found = _FILE.findall(lines.read())
    except OSError:
        return []
    return [(int(start, 16), int(stop, 16)) for start, stop, inode in found if inode != "0"]
