"""Kernels that oneDNN compiles for every new length of a batch must not stay for ever."""

import os
import subprocess
import sys

import pytest

from topwork.common.devices import ALLOCATOR, CACHED_KERNELS, let_gpu_memory_grow, limit_kernel_caches

NAMES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
MANY_LENGTHS = """
import re
from topwork.common.devices import limit_kernel_caches
limit_kernel_caches()
import torch
torch.set_num_threads(1)
w, x = torch.randn(32, 64).bfloat16(), torch.randn(1024, 64).bfloat16()
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) >> 10
sizes = []
for length in range(1, 1001):
    torch.mm(x[:length], w.t())
    if length % 500 == 0:
        sizes.append(resident())
print(sizes[1] - sizes[0])
"""


def test_what_the_environment_says_goes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAMES[0], "7")
    monkeypatch.delenv(NAMES[1], raising=False)
    limit_kernel_caches()
    assert [os.environ.pop(name) for name in NAMES] == ["7", str(CACHED_KERNELS)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_thousand_lengths_do_not_grow_the_process() -> None:
    """Without the limit 500 more lengths take 300 MiB and more, where oneDNN multiplies bf16."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", MANY_LENGTHS], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 60


def test_memory_of_a_gpu_grows_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    let_gpu_memory_grow()
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "max_split_size_mb:64")
        let_gpu_memory_grow()
        assert os.environ.pop(name) == "max_split_size_mb:64"
        assert not any(name in os.environ for name in ALLOCATOR)
    monkeypatch.setattr(sys, "platform", "win32")
    let_gpu_memory_grow()
    assert not any(name in os.environ for name in ALLOCATOR)
