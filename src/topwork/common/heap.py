"""The C library's heap: what was freed in it and not given back."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Any


def trim_heap() -> None:
    """Give the system the whole pages that are free in the C library's heap (glibc alone can).

    Reading a base or making adapters frees large pieces between others that stay, and a heap keeps those: up to half of
    a base whose layers were joined. Nothing is lost but the time to take pages again, so it is called where a phase
    ends, not in a step.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], Any] | None:
    if sys.platform != "linux":
        return None
    found: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if found is not None:
        found.argtypes = (ctypes.c_size_t,)
    return found
