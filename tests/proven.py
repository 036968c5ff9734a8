"""The longest tests, which run again only when something that they read has changed.

They are of a GPU's kernels and tools, of a pass's memory, and of every method and packed base against what it has to
equal; they take a third of all the time, and most changes touch nothing of what they read.
`tests/proven.json` says for each the hash of its sources as they were when it last passed: where that still is their
hash, `make test` leaves it out and says so. `make proven` runs all of them, whatever the hashes, and writes the file.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "tests" / "proven.json"
OPTION = "--again"

_KERNELS = ("src/topwork/ops", "tests/reference", "tests/ops", "constraints.txt")
_STEPS = (
    *_KERNELS, "src/topwork/adapters/methods", "src/topwork/adapters/module.py", "src/topwork/models/fast.py",
    "src/topwork/models/checkpointing.py", "src/topwork/generation/engine.py", "src/topwork/generation/passes.py",
    "src/topwork/training/step.py", "src/topwork/training/optimizers.py",
)  # fmt: skip
_BASES = (
    *_KERNELS, "tests/adapters", "src/topwork/adapters", "src/topwork/common", "src/topwork/data",
    "src/topwork/generation", "src/topwork/merging", "src/topwork/models", "src/topwork/quantization",
    "src/topwork/training",
)  # fmt: skip
_PARITY = (
    "tests/training/test_peft_parity.py", "src/topwork/objectives", "src/topwork/recipe",
    "src/topwork/run/beginning_from.py",
)  # fmt: skip
_TOOLS = tuple(
    f"benchmarks/{name}.py" for name in ("common", "checkpointing", "grouped", "many_adapters", "random_base")
)
PROVEN = {
    "tests/ops/test_triton_attention.py": _KERNELS,
    "tests/ops/test_triton_dequantize.py": _KERNELS,
    "tests/ops/test_triton_grouped.py": _KERNELS,
    "tests/ops/test_triton_layer.py": _KERNELS,
    "tests/ops/test_triton_steps.py": _KERNELS,
    "tests/training/test_pass_memory.py": (*_STEPS, "src/topwork/models", "src/topwork/quantization"),
    "tests/training/test_on_a_card.py": (*_STEPS, "tests/training/card_steps.py"),
    "tests/tools/test_gpu_check.py": (*_STEPS, *_TOOLS, "tools/gpu", "tools/gpu_check.py", "tools/gpu_check.sh"),
    "tests/adapters/test_peft_tables.py": (*_BASES, "tools/peft_tables.py"),
    "tests/adapters/test_properties.py": _BASES,
    "tests/adapters/test_quantized_base.py": _BASES,
    "tests/adapters/test_embedding_parts.py": _BASES,
    "tests/adapters/test_expert_lora.py": _BASES,
    "tests/adapters/test_factored_methods.py": (*_BASES, *_PARITY),
    "tests/adapters/test_peft_methods.py": (*_BASES, *_PARITY),
    "tests/training/test_peft_parity.py": (*_BASES, *_PARITY),
    "tests/merging/test_merge_stream.py": (*_BASES, "tests/merging/streams.py"),
    "tests/generation/test_company.py": (*_BASES, "tests/generation"),
    "tests/models/test_quantized.py": _BASES,
}
"""The file of such tests (those in it that are marked slow), and what they read."""


def is_proven(file: str) -> bool:
    """Whether the slow tests of this file passed on the very sources that there are now."""
    return file in PROVEN and recorded().get(file) == digest(file)


def recorded() -> dict[str, str]:
    """The hash of each file's sources when its slow tests last passed."""
    hashes: dict[str, str] = json.loads(RECORD.read_text("utf-8")) if RECORD.is_file() else {}
    return hashes


def digest(file: str, root: Path = ROOT) -> str:
    """One hash of the test's own file and all that it reads: sources, by name and content."""
    hashed = hashlib.sha256()
    for path in sorted({path for place in (file, *PROVEN[file]) for path in _sources(root / place)}):
        hashed.update(f"{path.relative_to(root).as_posix()}\0".encode())
        hashed.update(hashlib.sha256(path.read_bytes()).digest())
    return hashed.hexdigest()


def _sources(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
        return
    for path in place.rglob("*"):
        if path.is_file() and path.suffix in (".py", ".c", ".h", ".cpp", ".sh"):
            yield path


def prove() -> int:
    """Run them, and write down the sources that they passed on; pytest's exit code."""
    before = {file: digest(file) for file in sorted(PROVEN)}
    command = [sys.executable, "-m", "pytest", "-n", "2", "-m", "slow and not gpu", OPTION, *before]
    ended = subprocess.run(command, cwd=ROOT, check=False).returncode
    if ended == 0:
        RECORD.write_text(json.dumps(before, indent=2) + "\n", "utf-8")
    return ended


if __name__ == "__main__":
    sys.exit(prove())
