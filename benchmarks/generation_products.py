"""Generation's products beside torch.mm: rows times weights that come from memory, as a layer's do token after token.

    python benchmarks/generation_products.py [--rounds 9]

A stack of weights of SmolLM2-135M's gate and up, larger than any cache, one after the other, in turns: torch.mm, ours
(`ops/native/product.h`) and ours over the same weights in NF4. Reading them is the bound for few rows, so how fast as
many bytes are read (added up, as int64) stands beside. Writes benchmarks/results/generation_products.*
"""

import argparse
import os
import time
from collections.abc import Callable
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from common import BENCHMARKS, surroundings, surroundings_text, table, threads, write_record
from topwork.ops import decode as c
from topwork.ops.packed import pack_4bit

INPUTS, OUTPUTS, WEIGHTS = 576, 3072, 60
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)


def ours(x: Tensor, weights: list[c.Weight], scratch: Tensor) -> Callable[[], None]:
    """One call over the whole stack."""
    out, rows = torch.empty(len(x), OUTPUTS, dtype=x.dtype), len(x)
    arrays = [c.array_of([weight]) for weight in weights]
    steps = c.array_of([
        c.Step(op=c.PRODUCTS, in_=x.data_ptr(), in_by=INPUTS, out=out.data_ptr(), out_by=OUTPUTS, out_kind=1, count=1,
               weights=c.address_of(array))
        for array in arrays
    ])  # fmt: skip
    segment, runs = c.array_of([c.Segment(0, rows, None)]), c.array_of([c.Run()])
    over = c.Pass(
        rows=rows, segments=1, segment=c.address_of(segment), run=c.address_of(runs), scratch=scratch.data_ptr(),
        scratch_each=scratch.shape[1], threads=threads(),
    )  # fmt: skip
    held = (arrays, segment, runs, out)

    def call() -> None:
        assert held
        c.run_steps(steps, over, x.dtype)

    return call


def by_torch(x: Tensor, weights: Tensor) -> Callable[[], None]:
    """A product for each weight."""
    out = torch.empty(len(x), OUTPUTS, dtype=x.dtype)

    def call() -> None:
        for weight in weights:
            torch.mm(x, weight.t(), out=out)

    return call


def milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def measured(rounds: int) -> dict[str, Any]:
    """By rows and way the quartiles of milliseconds for the stack; and what reading it took."""
    weights, kept = torch.randn(WEIGHTS, OUTPUTS, INPUTS).bfloat16(), c.Kept()
    packed = [pack_4bit(weight, "nf4", 64, True) for weight in weights]
    dense = [found for w in weights if (found := c.weight_of(w, None, w.dtype, kept)) is not None]
    four = [found for p in packed if (found := c.weight_of(p, None, weights.dtype, kept)) is not None]
    assert len(dense) == len(four) == WEIGHTS
    scratch = torch.zeros(threads(), c.scratch_floats(max(ROWS), INPUTS, 16, 64))
    whole = weights.view(torch.int64).flatten()
    found: dict[str, Any] = {"read": []}
    for rows in ROWS:
        x = torch.randn(rows, INPUTS).bfloat16()
        calls = {"torch": by_torch(x, weights), "ours": ours(x, dense, scratch), "ours, NF4": ours(x, four, scratch)}
        turns: dict[str, list[float]] = {name: [] for name in (*calls, "read")}
        for turn in range(rounds + 1):
            for name, call in (*calls.items(), ("read", lambda: whole.sum())):
                took = milliseconds(call)
                if turn:
                    turns[name].append(took)
        found["read"] += turns.pop("read")
        found[str(rows)] = {name: [round(q, 3) for q in quantiles(took, n=4)] for name, took in turns.items()}
    found["read"] = [round(q, 3) for q in quantiles(found["read"], n=4)]
    return found


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    took, read = record["ms"], record["ms"]["read"]

    def told(three: list[float]) -> str:
        return f"{three[1]:.2f} ({three[0]:.2f}–{three[2]:.2f})"

    rows = [
        [count, *(told(took[count][name]) for name in ("torch", "ours", "ours, NF4")),
         f"{took[count]['torch'][1] / took[count]['ours'][1]:.2f} ×"]
        for count in map(str, ROWS)
    ]  # fmt: skip
    size = WEIGHTS * OUTPUTS * INPUTS * 2
    parts = [
        "# Generation's products beside torch.mm",
        f"{WEIGHTS} weights of [{OUTPUTS}, {INPUTS}] in bf16 ({size / 1e6:.0f} MB), milliseconds for all: medians of "
        f"{record['rounds']} rounds in turns, quartiles in brackets. Adding up as many bytes took {told(read)} "
        f"({size / read[1] / 1e6:.1f} GB/s). Load average before: {record['load']:.2f}.",
        table(["rows", "torch.mm", "ours", "ours over NF4", "torch / ours"], rows),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(threads())
    load = os.getloadavg()[0]
    record = {"rounds": given.rounds, "load": load, "ms": measured(given.rounds), "surroundings": surroundings()}
    write_record(BENCHMARKS / "results" / "generation_products", record, text(record))
    print(text(record))


if __name__ == "__main__":
    main()
