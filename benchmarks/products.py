"""What a layer's matrix products cost beyond their arithmetic: standing apart, and at a length met for the first time.

    python benchmarks/products.py [--tokens 2048] [--rounds 15]

Linear layers with one input (q, k, v; gate, up) as one product over weights that stand behind one another, and as
products of their own, forward and backward, in turns. Then the products of a LoRA step at lengths that the process has
not met: oneDNN compiles a kernel for each and keeps it; memory is the C heap's. Writes benchmarks/results/products.*
"""

import argparse
import ctypes
import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from common import BENCHMARKS, surroundings, surroundings_text, table, threads, write_record

GROUPS = {
    "SmolLM2-135M: q, k, v": (576, [576, 192, 192]),
    "SmolLM2-135M: gate, up": (576, [1536, 1536]),
    "Llama-3.2-1B: q, k, v": (2048, [2048, 512, 512]),
    "Llama-3.2-1B: gate, up": (2048, [8192, 8192]),
}
"""Width of the input, and of each output."""
RANK = 48
NEW_LENGTHS = (1888, 1891, 1892, 1901, 1920, 1950, 1999)

Call = Callable[[], Any]


class _Heap(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def heap_bytes() -> int:
    """What the C heap holds in use, the large blocks that it maps too."""
    call = ctypes.CDLL(None).mallinfo2
    call.restype = _Heap
    heap = call()
    return int(heap.uordblks + heap.hblkhd)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def group_calls(tokens: int, width: int, outputs: list[int]) -> dict[str, Call]:
    """Forward and backward of a group, as one product and as several, into the same buffer."""
    x, dy, weight = drawn(tokens, width), drawn(tokens, sum(outputs)), drawn(sum(outputs), width)
    out, dx = torch.empty_like(dy), torch.empty_like(x)
    apart = [part.clone() for part in weight.split(outputs)]
    pairs = list(zip(apart, out.split(outputs, 1), dy.split(outputs, 1)))

    def forward_apart() -> None:
        for own, columns, _ in pairs:
            torch.mm(x, own.t(), out=columns)

    def backward_apart() -> None:
        for at, (own, _, slope) in enumerate(pairs):
            torch.addmm(dx, slope, own, beta=1 if at else 0, out=dx)

    return {
        "forward, joined": lambda: torch.mm(x, weight.t(), out=out), "forward, apart": forward_apart,
        "backward, joined": lambda: torch.mm(dy, weight, out=dx), "backward, apart": backward_apart,
    }  # fmt: skip


def milliseconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def in_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Lower quartile, median and upper quartile of each call's milliseconds."""
    turns = [{name: milliseconds(call) for name, call in calls.items()} for _ in range(rounds + 1)][1:]
    return {name: [round(q, 3) for q in quantiles([turn[name] for turn in turns], n=4)] for name in calls}


def new_lengths(width: int = 576, outputs: int = 3072) -> dict[str, dict[str, float]]:
    """Of each kind of product: milliseconds more at a new length than again, and MB kept for it, medians."""
    wide, w, a = drawn(2048, outputs), drawn(outputs, width), drawn(RANK, width)
    y, dx, s = drawn(2048, outputs), drawn(2048, width), drawn(2048, RANK)
    kinds: dict[str, Callable[[int], Any]] = {
        "x W'": lambda t: torch.mm(wide[:t, :width], w.t(), out=y[:t]),
        "dy W": lambda t: torch.mm(wide[:t], w, out=dx[:t]),
        "x A'": lambda t: torch.mm(wide[:t, :width], a.t(), out=s[:t]),
        "G' x": lambda t: torch.mm(s[:t].t(), wide[:t, :width]),
        "dx + G A": lambda t: dx[:t].addmm_(s[:t], a),
    }
    found: dict[str, dict[str, float]] = {}
    for name, call in kinds.items():
        call(2048)
        more, kept = [], []
        for length in NEW_LENGTHS:
            before = heap_bytes()
            first, again = (milliseconds(partial(call, length)) for _ in range(2))
            more.append(first - again)
            kept.append((heap_bytes() - before) / 1e6)
        found[name] = {"first_call_ms_more": round(median(more), 3), "kept_mb": round(median(kept), 3)}
    return found


def text(record: dict[str, Any]) -> str:
    """The record for people."""

    def told(three: list[float]) -> str:
        return f"{three[1]:.2f} ({three[0]:.2f}–{three[2]:.2f})"

    rows = [
        [
            f"{name}, {way}", told(took[f"{way}, joined"]), told(took[f"{way}, apart"]),
            f"{took[f'{way}, apart'][1] / took[f'{way}, joined'][1]:.2f} ×",
        ]
        for name, took in record["groups"].items()
        for way in ("forward", "backward")
    ]  # fmt: skip
    lengths = [
        [name, f"{row['first_call_ms_more']:.2f}", f"{row['kept_mb']:.2f}"]
        for name, row in record["new_lengths"].items()
    ]
    parts = [
        "# Products joined and apart, and at lengths met for the first time",
        f"bf16, {record['tokens']} tokens. Medians of {record['rounds']} rounds in turns, quartiles in brackets.",
        table(["group", "joined, ms", "apart, ms", "apart / joined"], rows),
        f"SmolLM2-135M's widths, {len(NEW_LENGTHS)} new lengths, medians:",
        table(["product", "first call takes more by, ms", "heap kept, MB"], lengths),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(threads())
    found = new_lengths()
    groups = {name: in_turns(group_calls(given.tokens, *shape), given.rounds) for name, shape in GROUPS.items()}
    record = {
        "tokens": given.tokens, "rounds": given.rounds, "groups": groups, "new_lengths": found,
        "surroundings": surroundings(),
    }  # fmt: skip
    write_record(BENCHMARKS / "results" / "products", record, text(record))
    print(text(record))


if __name__ == "__main__":
    main()
