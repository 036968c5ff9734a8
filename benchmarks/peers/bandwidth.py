"""How fast this machine reads memory: C threads that add up a buffer larger than its caches (`workers.py`).

python -m peers.bandwidth      (in benchmarks/)
"""

import ctypes
import os
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from workers import answer

from common import threads

BUFFER_BYTES = 512 * 2**20
PASSES = 5

SOURCE = """
#include <pthread.h>
#include <stdint.h>

typedef struct { const uint64_t *from; int64_t words; uint64_t sum; } Part;

static void *add(void *given) {
    Part *part = given;
    uint64_t sums[32] = {0};
    for (int64_t at = 0; at + 32 <= part->words; at += 32)
        for (int lane = 0; lane < 32; lane++) sums[lane] += part->from[at + lane];
    for (int lane = 0; lane < 32; lane++) part->sum += sums[lane];
    return 0;
}

uint64_t read_all(const uint64_t *from, int64_t words, int threads) {
    pthread_t ids[64];
    Part parts[64];
    uint64_t sum = 0;
    int64_t each = words / threads / 32 * 32;
    for (int t = 0; t < threads; t++) parts[t] = (Part){from + t * each, each, 0};
    for (int t = 1; t < threads; t++) pthread_create(&ids[t], 0, add, &parts[t]);
    add(&parts[0]);
    for (int t = 1; t < threads; t++) pthread_join(ids[t], 0);
    for (int t = 0; t < threads; t++) sum += parts[t].sum;
    return sum;
}
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        source, library = Path(place) / "read.c", Path(place) / "read.so"
        source.write_text(SOURCE, "ascii")
        compiler = os.environ.get("CC", "cc").split()
        subprocess.run(
            [*compiler, "-O3", "-march=native", "-shared", "-fPIC", "-pthread", source, "-o", library], check=True
        )
        read = ctypes.CDLL(str(library)).read_all
    read.restype, read.argtypes = ctypes.c_uint64, [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    words = np.arange(BUFFER_BYTES // 8, dtype=np.uint64)
    expected = int(words.sum())
    assert read(words.ctypes.data, len(words), threads()) == expected

    def measured(_: int) -> dict[str, Any]:
        seconds = []
        for _ in range(PASSES):
            begun = time.perf_counter()
            read(words.ctypes.data, len(words), threads())
            seconds.append(time.perf_counter() - begun)
        return {"bytes_per_second": BUFFER_BYTES / median(seconds), "best": BUFFER_BYTES / min(seconds)}

    answer({"read": measured}, buffer_bytes=BUFFER_BYTES)


if __name__ == "__main__":
    main()
