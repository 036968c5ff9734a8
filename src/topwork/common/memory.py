"""How much memory the process may still take, who says so, and what it looks like when there is none."""

import ctypes
import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topwork.common.cgroups import cgroup_limits
from topwork.common.errors import RunError, TopworkError

if TYPE_CHECKING:
    import torch

MACHINE = "free memory"
UNKNOWN_BYTES = 2 << 30
"""Where a machine tells nothing at all."""


@dataclass(frozen=True)
class Free:
    """Bytes that the process may still take, and what says so, as the end of "from …"."""

    bytes: int
    source: str = MACHINE

    @property
    def limited(self) -> bool:
        """Whether somebody set a limit, below what the machine has."""
        return self.source != MACHINE


def free_memory_bytes(device: "torch.device") -> int:
    """What could still be taken."""
    return free_memory(device).bytes


def free_memory(device: "torch.device") -> Free:
    """What could still be taken, of a GPU's memory or, for the CPU, of the process's (`free_host_memory`)."""
    if device.type == "cuda":
        import torch

        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch gives it out again
        return Free(int(torch.cuda.mem_get_info(device)[0]) + cached)
    return free_host_memory()


def taken_memory(device: "torch.device") -> int:
    """What the process has taken of it: tensors of a GPU's, of a CPU's what is resident."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    told = _kilobytes(Path("/proc/self/status")).get("VmRSS")
    return _largest_so_far() if told is None else told


def _largest_so_far() -> int:
    """Where the system has no /proc."""
    from topwork.common.devices import largest_resident_bytes

    return largest_resident_bytes()


def free_host_memory(root: Path = Path("/")) -> Free:
    """The least of what the machine, the process's control groups and its resource limits leave; never an error. `root`
    is where proc and sys are."""
    groups = [_left(one.limit_bytes, one.used_bytes, "that this container may use") for one in cgroup_limits(root)]
    known = [*_machine(root), *groups, *_resource_limits(root)]
    return min(known, key=lambda free: free.bytes) if known else Free(_half_of_all())


def _left(limit: int, used: int, of: str) -> Free:
    return Free(max(0, limit - used), f"the {limit / 10**6:,.0f} MB {of}")


def _machine(root: Path) -> list[Free]:
    if sys.platform == "darwin":
        return _freed(mac_free_bytes(_vm_stat()))
    if sys.platform == "win32":
        return _freed(_windows_free_bytes())
    told = _kilobytes(root / "proc/meminfo")
    found = _freed(told.get("MemAvailable"))
    if _text(root / "proc/sys/vm/overcommit_memory").strip() == "2" and {"CommitLimit", "Committed_AS"} <= told.keys():
        found.append(_left(told["CommitLimit"], told["Committed_AS"], "that this machine promises (vm.overcommit)"))
    return found


def _freed(found: int | None) -> list[Free]:
    return [] if found is None else [Free(found)]


def _resource_limits(root: Path) -> list[Free]:
    """Of address space and of data; the process is known by /proc alone."""
    try:
        import resource
    except ImportError:  # Windows
        return []
    used, found = _kilobytes(root / "proc/self/status"), []
    for name, field, option in (("RLIMIT_AS", "VmSize", "-v"), ("RLIMIT_DATA", "VmData", "-d")):
        try:
            limit = resource.getrlimit(getattr(resource, name))[0]
        except (AttributeError, ValueError, OSError):
            continue
        if limit not in (-1, resource.RLIM_INFINITY) and field in used:
            found.append(_left(limit, used[field], f"that this process may use (ulimit {option})"))
    return found


def mac_free_bytes(told: str) -> int | None:
    """What `vm_stat` counts as free, or gives up without writing it anywhere; None where it says something else."""
    page = re.search(r"page size of (\d+) bytes", told)
    pages = {name: int(count) for name, count in re.findall(r"^Pages ([a-z ]+):\s+(\d+)\.?$", told, re.MULTILINE)}
    if page is None or "free" not in pages:
        return None
    return int(page[1]) * sum(pages.get(name, 0) for name in ("free", "inactive", "speculative"))


def _vm_stat() -> str:
    import subprocess

    try:
        return subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32), ("load_percent", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in (
            "total", "free", "total_committed", "free_committed", "total_virtual", "free_virtual", "free_extended",
        )),
    )  # fmt: skip


def _windows_free_bytes() -> int | None:
    """Of memory, of what may be committed, and of addresses the least."""
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    try:
        library: Any = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
        if not library.GlobalMemoryStatusEx(ctypes.byref(status)):
            return None
    except (OSError, AttributeError):
        return None
    return int(min(status.free, status.free_committed, status.free_virtual))


def _half_of_all() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):
        return UNKNOWN_BYTES


def _kilobytes(path: Path) -> dict[str, int]:
    """The lines `Name: 12 kB` of a file in /proc, in bytes."""
    found = re.findall(r"^(\w+):\s+(\d{1,18}) kB$", _text(path), re.MULTILINE)
    return {name: int(count) * 1024 for name, count in found}


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", errors="replace")
    except (OSError, ValueError):
        return ""


# When there is none


SAID = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|std::bad_alloc|bad allocation|"
    r"insufficient memory|alloc_failed|no memory for|unable to allocate|paging file is too small",
    re.IGNORECASE,
)
"""Words of torch, CUDA, cuBLAS, the C++ and C libraries, Rust's (safetensors), numpy's, Windows's and our C kernels."""
NO_MEMORY = {errno.ENOMEM}
NO_MEMORY_WINDOWS = {8, 14, 1455}


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, tells that memory could not be had. One of Topwork's own says
    what is to be said already."""
    if error is None or isinstance(error, TopworkError):
        return False
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    if isinstance(error, OSError) and (
        error.errno in NO_MEMORY or getattr(error, "winerror", None) in NO_MEMORY_WINDOWS
    ):
        return True
    return bool(isinstance(error, Exception) and SAID.search(str(error))) or out_of_memory(error.__cause__)


@contextmanager
def memory_for(work: str, less: str) -> Iterator[None]:
    """`work` ("reading the base") that may end for want of memory: as RunError that says so and, with `less`, what to
    lower. A decorator too."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise RunError(f"out of memory while {work}; {less}") from error
