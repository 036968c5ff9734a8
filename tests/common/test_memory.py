"""How much memory is free, who says so, and which errors say that there is none."""

import errno
import resource
from pathlib import Path

import numpy
import pytest
import torch

from topwork.common import memory
from topwork.common.errors import RunError
from topwork.common.memory import (
    MACHINE,
    Free,
    free_host_memory,
    free_memory_bytes,
    mac_free_bytes,
    memory_for,
    out_of_memory,
)

MB = 10**6
KB = 1024
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            500000.
Pages inactive:                           20000.
Pages speculative:                         3000.
Pages throttled:                              0.
"Translation faults":                 123456789.
"""


def machine(root: Path, **files: str) -> Path:
    """A root with proc/meminfo and whatever else is given by its path, with __ for /."""
    for name, text in {"proc__meminfo": f"MemTotal: 9000 kB\nMemAvailable: {8000} kB\n", **files}.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return root


@pytest.fixture(autouse=True)
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "linux")


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert free_host_memory(machine(tmp_path)) == Free(8000 * KB, MACHINE)
    assert not free_host_memory(tmp_path).limited


def test_a_container_may_have_less(tmp_path: Path) -> None:
    mount = "35 24 0:30 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
    root = machine(
        tmp_path, proc__self__cgroup="0::/", proc__self__mountinfo=mount, sys__fs__cgroup__memory_max="unused"
    )
    (root / "sys/fs/cgroup/memory.max").write_text("5000000\n")
    (root / "sys/fs/cgroup/memory.current").write_text("2000000\n")
    assert free_host_memory(root) == Free(3 * MB, "the 5 MB that this container may use")
    (root / "sys/fs/cgroup/memory.current").write_text("6000000\n")
    assert free_host_memory(root).bytes == 0
    (root / "sys/fs/cgroup/memory.max").write_text("5000000000\n")
    assert free_host_memory(root).source == MACHINE


@pytest.mark.parametrize(
    ("name", "field", "told"), [("RLIMIT_AS", "VmSize", "(ulimit -v)"), ("RLIMIT_DATA", "VmData", "(ulimit -d)")]
)
def test_limits_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, field: str, told: str
) -> None:
    limits = {getattr(resource, name): (6 * MB, -1)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits.get(which, (resource.RLIM_INFINITY, -1)))
    root = machine(tmp_path, proc__self__status=f"Name:\tpython\n{field}:\t    1000 kB\n")
    assert free_host_memory(root) == Free(6 * MB - 1000 * KB, f"the 6 MB that this process may use {told}")
    (root / "proc/self/status").unlink()
    assert free_host_memory(root).source == MACHINE


def test_a_machine_that_promises_no_more_than_it_has(tmp_path: Path) -> None:
    told = "MemAvailable: 8000 kB\nCommitLimit: 9000 kB\nCommitted_AS: 8500 kB\nHugePages_Total: 0\n"
    root = machine(tmp_path, proc__meminfo=told, proc__sys__vm__overcommit_memory="0\n")
    assert free_host_memory(root) == Free(8000 * KB)
    (root / "proc/sys/vm/overcommit_memory").write_text("2\n")
    assert free_host_memory(root).bytes == 500 * KB


@pytest.mark.parametrize("told", ["", "MemAvailable:\n", "MemAvailable: -3 kB\n", "MemAvailable: 1 MB", "\x00\xff"])
def test_a_machine_that_does_not_tell(tmp_path: Path, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, proc__meminfo=told)
    assert free_host_memory(root).bytes > 100 * MB
    monkeypatch.delattr(memory.os, "sysconf")  # Windows
    assert free_host_memory(root) == Free(memory.UNKNOWN_BYTES)


def test_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert mac_free_bytes(VM_STAT) == 33000 * 16384
    assert mac_free_bytes("sh: vm_stat: not found") is None
    monkeypatch.setattr(memory, "_vm_stat", lambda: VM_STAT)
    assert free_host_memory(tmp_path) == Free(33000 * 16384)
    monkeypatch.setattr(memory, "_vm_stat", lambda: "")
    assert free_host_memory(tmp_path).bytes > 0


def test_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def GlobalMemoryStatusEx(pointer: object) -> int:
            status = pointer._obj  # type: ignore[attr-defined]
            assert status.length == 64
            status.free, status.free_committed, status.free_virtual = 5 * MB, 3 * MB, 1 << 46
            return 1

    monkeypatch.setattr(memory.sys, "platform", "win32")
    assert free_host_memory(tmp_path).bytes > 0  # there is no such library here
    monkeypatch.setattr(memory.ctypes, "WinDLL", lambda _: Library, raising=False)
    assert free_host_memory(tmp_path) == Free(3 * MB)


def _torch_error() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


def _numpy_error() -> Exception:
    with pytest.raises(MemoryError) as caught:
        numpy.empty(1 << 60, dtype=numpy.uint8)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        _torch_error(),
        _numpy_error(),
        MemoryError(),
        MemoryError("no memory for attention over 5 tokens of 3 heads"),
        torch.OutOfMemoryError("CUDA out of memory."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        Exception("Error while deserializing header: Cannot allocate memory (os error 12)"),
    ],
)
def test_errors_that_say_so(error: Exception) -> None:
    assert out_of_memory(error)
    with (
        pytest.raises(RunError, match=r"^out of memory while merging; --check 0 takes less$") as caught,
        memory_for("merging", "--check 0 takes less"),
    ):
        raise error
    assert not out_of_memory(caught.value), "once said is enough"
    wrapped = ValueError("a weight could not be read")
    wrapped.__cause__ = error
    assert out_of_memory(wrapped)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("shapes differ"), ValueError(), RunError("memory")],
)
def test_errors_that_do_not(error: Exception) -> None:
    assert not out_of_memory(error)
    with pytest.raises(type(error)) as caught, memory_for("merging", "nothing"):
        raise error
    assert caught.value is error


def test_what_is_free_here() -> None:
    """Something, and no more than there is; whatever this machine is."""
    assert 0 < free_memory_bytes(torch.device("cpu")) < 1 << 50
