"""The process in which a compiled kernel is tried (`proof.py` starts it): torch first, then the library, then trials.

    stdin    the library's path, or nothing where it could not be compiled
    stdout   "ready" once torch is there, then {"kind": …, "why": …}

What is imported here takes longer than what is tried; so it begins while the kernel is still being compiled.
"""

import ctypes
import json
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

import torch

from topwork.ops.native import load
from topwork.ops.native.proof import READY
from topwork.ops.native.trials import TRIALS, Case

THREADS = (1, 3)
"""One at first: what goes wrong there is the kernel's own."""


def main(name: str, seconds: int) -> None:
    """Try the library of NAME.c that is named on stdin, and say what came out; the system ends the process after so
    many seconds of it, wherever it is."""
    _leave_no_core()
    print(READY, flush=True)
    path = sys.stdin.readline().rstrip("\n")
    if not path:
        return
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
    kind, why = verdict(name, path)
    print(json.dumps({"kind": kind, "why": why}), flush=True)


def verdict(name: str, path: str) -> tuple[str, str]:
    """As `proof.Verdict` has them."""
    try:
        library = load.declared(name, ctypes.CDLL(path))
    except (OSError, AttributeError) as error:
        return "not loaded", f"cannot be loaded ({error})"
    load.compiled = lambda asked: library if asked == name else None  # type: ignore[assignment]
    try:
        why = fault(TRIALS[name])
    except MemoryError as error:
        return "untried", f"could not be tried ({error or 'no memory'})"
    except Exception as error:
        return "refused", f"failed when it was tried ({type(error).__name__}: {error})"
    return ("refused", why) if why else ("right", "")


def fault(cases: Callable[[], list[Case]]) -> str:
    """What is wrong with the first case that is, in words behind "it"; an empty string where none is."""
    first: list[Case] = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        found = cases()
        for case in found:
            far = case.far()
            if not far <= case.limit:
                return f"computes wrong sums ({case.what}: off by {far:.2g}, where rounding is off by {case.limit:g})"
        for case, alone in zip(found, first):
            if not torch.equal(case.found, alone.found):
                return f"computes other sums on {threads} threads than on one ({case.what})"
        first = found
    return ""


def _leave_no_core() -> None:
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
