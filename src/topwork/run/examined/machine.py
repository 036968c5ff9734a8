"""The processor, memory, disks and cards of this machine, for `topwork doctor`. What cannot be read is left out."""

import os
import platform
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from topwork.common.cgroups import cgroup_cores, cgroup_limits
from topwork.common.memory import free_host_memory

FEATURES = {
    "AVX2": ("avx2",), "FMA": ("fma",), "AVX-512": ("avx512f", "avx512bw", "avx512vl"),
    "AVX-512 BF16": ("avx512_bf16",), "AMX": ("amx_tile", "amx_bf16"), "SVE": ("sve",), "bf16": ("bf16",),
}  # fmt: skip
"""What kernels are compiled for -> how /proc/cpuinfo names it. The last two are ARM's."""
_ARM_ONLY = ("SVE", "bf16")
_NVIDIA = "0x10de"


def processor(root: Path = Path("/")) -> dict[str, Any]:
    """Its name, cores and what it can do; how much of it this process may use."""
    told = _cpuinfo(root)
    flags = set((told.get("flags") or told.get("Features") or "").split())
    arm = platform.machine().lower() in ("arm64", "aarch64")
    features = {name: flags >= set(needed) for name, needed in FEATURES.items() if flags and (name in _ARM_ONLY) is arm}
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "name": told.get("model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or "unknown",
        "logical": os.cpu_count(),
        "threads_per_core": _threads_per_core(root),
        "may_run_on": affinity,
        "quota_cores": cgroup_cores(root),
        "features": features,
        "virtual": "hypervisor" in flags,
        "machine": _text(root / "sys/class/dmi/id/product_name") or None,
        "container": _container(root),
    }


def memory(root: Path = Path("/")) -> dict[str, Any]:
    """Bytes: all that the machine has, what the process may still take and who says so, the narrowest limit."""
    free = free_host_memory(root)
    limits = [limit.limit_bytes for limit in cgroup_limits(root)]
    total = re.search(r"^MemTotal:\s+(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE)
    all_bytes = int(total[1]) * 1024 if total else int(_sysctl("hw.memsize") or 0) or None
    return {
        "total_bytes": all_bytes,
        "free_bytes": free.bytes,
        "free_says": free.source,
        "cgroup_limit_bytes": min(limits, default=None),
    }


def disk(what: str, folder: Path) -> dict[str, Any]:
    """A folder that is used as a cache, which may not be there yet."""
    nearest = next((place for place in (folder, *folder.absolute().parents) if place.exists()), Path("/"))
    free = None
    with suppress(OSError):
        free = shutil.disk_usage(nearest).free
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return {"what": what, "path": str(folder), "is_there": folder.exists(), "writable": writable, "free_bytes": free}


def compiler() -> dict[str, Any]:
    """Its command, and how it calls itself; without, why not."""
    from topwork.ops.native.variants import compiler as command

    try:
        found = command()
        asked = [*found.split(), "--version"]
        done = subprocess.run(asked, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return {"command": None, "version": None, "why": str(error)}
    said = (done.stdout or done.stderr).strip().splitlines()
    return {"command": found, "version": said[0] if said else None, "why": ""}


def cards(root: Path = Path("/")) -> dict[str, Any]:
    """The GPUs that torch can use, how torch was built, and whether the machine has one of NVIDIA's at all."""
    import torch

    found: list[dict[str, Any]] = []
    try:
        found = [_card(number) for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
        why = ""
    except Exception as error:  # a driver that fails, in whatever way
        why = " ".join(str(error).split())[:300]
    return {
        "cards": found,
        "torch_built_for": _built_for(torch),
        "driver": _driver(root),
        "seen": _there(root),
        "why": why,
    }


def threads() -> int:
    """How many torch would use."""
    import torch

    return torch.get_num_threads()


def _card(number: int) -> dict[str, Any]:
    import torch

    about = torch.cuda.get_device_properties(number)
    free = None
    with suppress(RuntimeError):  # one that another process has for itself
        free = torch.cuda.mem_get_info(number)[0]
    return {
        "name": about.name, "capability": f"{about.major}.{about.minor}", "total_bytes": about.total_memory,
        "free_bytes": free,
    }  # fmt: skip


def _built_for(torch: Any) -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPUs alone"


def _driver(root: Path) -> str | None:
    told = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _text(root / "proc/driver/nvidia/version"))
    return told[1] if told else None


def _there(root: Path) -> bool:
    """A device file, or a card of NVIDIA's on the bus."""
    if any((root / "dev").glob("nvidia[0-9]*")):
        return True
    for device in (root / "sys/bus/pci/devices").glob("*"):
        if _text(device / "vendor") == _NVIDIA and _text(device / "class").startswith("0x03"):
            return True
    return False


def _cpuinfo(root: Path) -> dict[str, str]:
    """Of the first processor."""
    first = _text(root / "proc/cpuinfo").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _threads_per_core(root: Path) -> int | None:
    """1 where cores do one thing at a time."""
    told = _text(root / "sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    if not told:
        return None
    count = 0
    for part in told.split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1 if first.isdigit() else 0
    return count or None


def _container(root: Path) -> str | None:
    marks = {".dockerenv": "docker", "run/.containerenv": "podman", "singularity": "singularity"}
    found = next((name for mark, name in marks.items() if (root / mark).exists()), None)
    return found or ("kubernetes" if "KUBERNETES_SERVICE_HOST" in os.environ else None)


def _sysctl(name: str) -> str:
    """macOS's."""
    if platform.system() != "Darwin":
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        asked = ["/usr/sbin/sysctl", "-n", name]
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except (OSError, ValueError):
        return ""
