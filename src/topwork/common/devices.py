"""What the machine has, and what the process used."""

import os
import platform
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CACHED_KERNELS = 128
"""A pass with one adapter meets about fifty shapes, and each is met again in every layer."""


def peak_memory_bytes(device: "torch.device") -> int:
    """The process's peak: resident memory on the CPU, allocated device memory on a GPU."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    try:  # getrusage would count what the process that started this one held as it did
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return largest_resident_bytes()


def largest_resident_bytes() -> int:
    """The process's, by getrusage; 0 where the platform has none (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def hardware(device: "torch.device") -> str:
    """The machine in a few words."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {os.cpu_count()} cores"


def cpu_name() -> str:
    """The processor, as it calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def limit_kernel_caches() -> None:
    """Keep oneDNN (and torch's cache before it) from holding a compiled kernel for every shape it ever met.

    Flat batches have a new length in every pass, so each makes some fifty new kernels of almost 1 MB each, and the
    caches hold 1,024 before they let go of one: 0.9 GB. A pass comes back to its own fifty only. Heeded if it is called
    before the first product of the process; what the environment says goes before.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(CACHED_KERNELS))


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""What torch reads of its allocator for a GPU, now and before 2.9."""


def let_gpu_memory_grow() -> None:
    """Ask torch to map a GPU's memory piece by piece into segments that grow.

    Flat batches have a new length in every pass, and blocks cut for one of them do not fit the next: torch's usual
    segments are left full of holes, until it gives all of them back and waits for the GPU while it does so. Heeded if
    it is called before CUDA begins in the process (its first tensor, or a look at free memory); what the environment
    says goes before.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
