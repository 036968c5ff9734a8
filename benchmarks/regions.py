"""How many parallel regions a training step enters, who enters them, and how long threads wait in them.

    python benchmarks/regions.py --data-dir DATA [--rows gsm8k|banking77] [--tokens 2048] [--quantized] [--ranks 16]
        [--model smollm2-135m] [--steps 5] [--out OUT]

The step is `profile_step.py`'s. A small library (regions.c) stands before the OpenMP library and counts: every region
is a place where all threads wait for the last one. `idle` is the share of the threads' time in a region in which one
had nothing left to do: waking up, uneven work, a core that was taken away. A caller is named as the loader knows it,
torch's and oneDNN's by their library. Linux and gcc's OpenMP alone. Prints Markdown, and writes OUT.json and OUT.md
where asked to.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from profile_step import WARM_UP, arguments, prepared

from common import BENCHMARKS, model_title, surroundings, surroundings_text, table, write_record

COUNTER = "TOPWORK_REGIONS"
"""In the environment the path of the library that counts."""
FIELDS = ("regions", "shared", "seconds", "idle_seconds")


def main() -> None:
    if COUNTER not in os.environ:
        sys.exit(again_with_counter())
    given = arguments(__doc__)
    trained, batch = prepared(given)
    learners = [trained.learner(name) for name in trained.adapters.configs]
    counter, steps, seconds = ctypes.CDLL(os.environ[COUNTER]), [], []
    for number in range(WARM_UP + given.steps):
        counter.regions_forget()
        start = time.perf_counter()
        trained.steps(learners, [batch])
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - start)
            steps.append(counted(counter))
    names = sorted({name for step in steps for name in step})
    callers = {
        name: dict(zip(FIELDS, (median(step[name][at] for step in steps) for at in range(len(FIELDS)))))
        for name in names
    }
    record = {
        "question": {key: getattr(given, key) for key in ("rows", "quantized", "ranks", "steps")},
        "model": model_title(trained.base.name), "tokens": len(batch.tokens), "seconds": median(seconds),
        "callers": callers, "surroundings": surroundings(),
    }  # fmt: skip
    if given.out:
        write_record(given.out, record, text(record))
    print(text(record))


def again_with_counter() -> int:
    """This script with the library before all others, which it must be when the process begins."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "regions.so"
        command = ["gcc", "-O2", "-shared", "-fPIC", str(BENCHMARKS / "regions.c"), "-o", str(library), "-ldl"]
        subprocess.run(command, check=True)
        environment = os.environ | {"LD_PRELOAD": str(library), COUNTER: str(library)}
        return subprocess.run([sys.executable, *sys.argv], env=environment).returncode


def counted(counter: ctypes.CDLL) -> dict[str, list[float]]:
    """Of each caller what FIELDS name."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(FIELDS))
    numbers, function, library = (ctypes.c_int64 * 4)(), ctypes.c_char_p(), ctypes.c_char_p()
    at = 0
    while counter.regions_of(ctypes.c_int64(at), numbers, ctypes.byref(function), ctypes.byref(library)):
        own = found[caller((function.value or b"").decode(), (library.value or b"").decode())]
        for field, value in enumerate(numbers):
            own[field] += value if field < 2 else value / 1e9
        at += 1
    return found


def caller(function: str, library: str) -> str:
    """The kernel, or what the library is called: of torch's functions the loader knows few."""
    return function if function.startswith("topwork_") else Path(library).name.split(".")[0]


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    callers = sorted(record["callers"].items(), key=lambda named: -named[1]["seconds"])
    total = {field: sum(own[field] for _, own in callers) for field in FIELDS}
    lines = [
        [
            name, f"{own['regions']:,.0f}", f"{own['shared']:,.0f}", f"{1e3 * own['seconds']:,.1f}",
            f"{1e6 * own['seconds'] / max(1, own['regions']):,.0f}",
            f"{own['idle_seconds'] / max(1e-9, own['seconds'] * record['surroundings']['hardware']['threads']):.0%}",
        ]
        for name, own in [*callers, ("all", total)]
    ]  # fmt: skip
    held = "NF4 with double quantization" if record["question"]["quantized"] else "bf16"
    return "\n\n".join([
        f"# Parallel regions of a step: {record['model']}, base in {held}, LoRA r = {record['question']['ranks']} on "
        "all linear layers",
        f"{record['tokens']:,} tokens of {record['question']['rows']}; medians of {record['question']['steps']} steps "
        f"of {1e3 * record['seconds']:,.0f} ms. `shared` are regions of more than one thread.",
        table(["entered by", "regions", "shared", "ms", "µs each", "idle"], lines),
        surroundings_text(record["surroundings"]),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
