"""A control group of either version with a limit on memory, as a container has it, for whoever may make one."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
JOIN = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"


@dataclass(frozen=True)
class Container:
    """A group, and the files by which its version sets the limit and tells the peak."""

    folder: Path
    peak_file: str

    def run(self, command: Sequence[str], **how: Any) -> subprocess.CompletedProcess[str]:
        """A command that is in the group before it begins."""
        joined = [sys.executable, "-S", "-c", JOIN, str(self.folder / "cgroup.procs"), *command]
        return subprocess.run(joined, capture_output=True, text=True, check=False, **how)

    @property
    def peak_bytes(self) -> int | None:
        """The most that it held, files in its cache included; None where the kernel does not tell."""
        try:
            return int((self.folder / self.peak_file).read_text())
        except (OSError, ValueError):
            return None


@contextmanager
def container(limit_bytes: int) -> Iterator[Container]:
    """A group of so many bytes, without swap, which is removed in the end. Raises OSError where none can be made."""
    version_1 = (V1 / "memory.limit_in_bytes").exists()
    folder = (V1 if version_1 else V2) / f"topwork-{os.getpid()}-{limit_bytes}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit_bytes))
        swap = folder / ("memory.memsw.limit_in_bytes" if version_1 else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(limit_bytes) if version_1 else "0")
        yield Container(folder, "memory.max_usage_in_bytes" if version_1 else "memory.peak")
    finally:
        folder.rmdir()
