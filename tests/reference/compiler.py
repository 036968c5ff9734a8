"""The C compiler and the processor that tests of native kernels find."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from topwork.ops.native import build, load

FEATURES = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
NATIVE = COMPILER is not None and not os.environ.get(build.OFF)
needs_compiler = pytest.mark.skipif(not NATIVE, reason="needs a C compiler, and native kernels not switched off")
usual_kernels = pytest.mark.skipif(
    not NATIVE or "avx512bw" not in FEATURES or {"CC", build.MARCH, build.AMX} & os.environ.keys(),
    reason="needs AVX-512, and kernels as they are compiled for it by default",
)

NARROW = "-mno-avx512f -mno-avx2 -mno-avx -mno-fma"
OLDER = {
    "-DEMULATE_AMX": 3,
    f"-DEMULATE_AMX {NARROW}": 3,
    "-DNO_AMX": 2 if "avx512_bf16" in FEATURES else 1 if "avx512bw" in FEATURES else 0,
    "-DNO_AMX -mno-avx512bf16": 1 if "avx512bw" in FEATURES else 0,
    "-DNO_AMX -mno-avx512f": 0,
    f"-DNO_AMX {NARROW}": 0,
}
"""How else a kernel is compiled -> the level that it then says."""
WITH_AMX = ("", "-DEMULATE_AMX", f"-DEMULATE_AMX {NARROW}")
"""How else than for this processor a kernel is compiled to have AMX."""
OlderBuild = Callable[[str], tuple[ctypes.CDLL, int]]


def build_kernel(name: str, how: str, folder: Path) -> ctypes.CDLL:
    """A kernel compiled for this processor, with further flags."""
    source, target = Path(build.__file__).parent / f"{name}.c", folder / f"{name}.so"
    flags = ["-march=native", *build.FLAGS, *how.split(), f"-I{source.parent}"]
    subprocess.run([*(COMPILER or "cc").split(), *flags, str(source), "-o", str(target), "-lm"], check=True)
    return load.declared(name, ctypes.CDLL(str(target)))


def build_older(name: str, without: str, folder: Path) -> tuple[ctypes.CDLL, int]:
    """A kernel compiled without some instructions, and its level."""
    return build_kernel(name, without, folder), OLDER[without]
