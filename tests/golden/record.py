"""Writes tests/golden/losses.json: `make golden`. Only where a change is meant to change the numbers; say why there."""

import os
import platform
import subprocess
import tempfile
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from golden.rows import ROWS, bases, run_row
from topwork.common.files import write_json

GOLDEN = Path(__file__).with_name("losses.json")
PACKAGES = ("torch", "transformers", "tokenizers")
SETTINGS = (
    "TOPWORK_NO_NATIVE", "TOPWORK_MARCH", "TOPWORK_AMX", "ATEN_CPU_CAPABILITY", "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "CC",
)  # fmt: skip
"""What makes the same processor compute otherwise."""


def surroundings() -> dict[str, str]:
    """What the bytes depend on beside the code: the processor, what compiles the kernels, and the libraries."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else []
    known = [line for line in lines if line.startswith(("model name", "cpu family", "flags", "Features"))]
    compiler = subprocess.run(["cc", "--version"], capture_output=True, text=True, check=False).stdout.partition("\n")[
        0
    ]
    return {
        "processor": sha256("\n".join(sorted(set(known))).encode()).hexdigest()[:16] if known else platform.processor(),
        "compiler": compiler,
        "settings": " ".join(f"{name}={value}" for name in SETTINGS if (value := os.environ.get(name))),
        **{name: version(name) for name in PACKAGES},
    }


def record() -> dict[str, Any]:
    """All rows anew."""
    with tempfile.TemporaryDirectory() as work:
        base_of = bases(Path(work))
        found = {}
        for number, (name, row) in enumerate(ROWS.items()):
            place = Path(work) / str(number)
            place.mkdir()
            found[name] = run_row(row, base_of(row), place)
    return {"made_with": surroundings(), "rows": found}


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_json(GOLDEN, record())
    print(f"{len(ROWS)} rows -> {GOLDEN}")
