"""The small products of many adapters' LoRA terms in one pass: in one call, and as a loop of torch's own.

    python benchmarks/grouped.py [--rounds 9]

N members share the rows of a pass, each with a range of its own and a rank from 2 to 64 in turns; the six products of a
layer's forward and backward are made for all of them. `new` draws other ranges every round, as a run over texts does,
for which oneDNN compiles kernels; `met` has the same ranges again. Writes benchmarks/results/grouped.*
"""

import argparse
import random
import time
from collections.abc import Sequence
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from common import BENCHMARKS, surroundings, surroundings_text, table, threads, write_record
from topwork.ops.grouped import Product, grouped_products

LAYERS = {
    "SmolLM2-135M: q, k, v": (576, (576, 192, 192)),
    "SmolLM2-135M: gate, up": (576, (1536, 1536)),
    "SmolLM2-135M: down": (1536, (576,)),
    "Llama-3.2-1B: gate, up": (2048, (8192, 8192)),
    "Llama-3.2-1B: down": (8192, (2048,)),
}
"""Width of the input, and of each output."""
MEMBERS = (1, 2, 6, 16)
TOKENS = (256, 2048)
RANKS = (16, 2, 64, 8, 32, 4)


class Layer:
    """Tensors of one group of projections, and its members' matrices in fp32, as masters are."""

    def __init__(self, width: int, outputs: Sequence[int], tokens: int, members: int) -> None:
        self.n, self.dn = drawn(tokens, width), drawn(tokens, width)
        self.y, self.dy = (drawn(tokens, sum(outputs)) for _ in range(2))
        self.outputs = outputs
        ranks = [RANKS[member % len(RANKS)] for member in range(members)]
        self.a = [drawn(len(outputs) * r, width).float() for r in ranks]
        self.b = [[drawn(out, r).float() for out in outputs] for r in ranks]

    def stages(self, bounds: Sequence[int]) -> list[list[Product]]:
        """S; Y; G; dA and dB; dX: the products of each stage do not depend on one another."""
        stages: list[list[Product]] = [[], [], [], [], []]
        for start, stop, a, own in zip(bounds, bounds[1:], self.a, self.b):
            rows, s, g = self.n[start:stop], *(torch.empty(stop - start, len(a)).bfloat16() for _ in range(2))
            stages[0].append(Product(rows, a.t(), s))
            parts = zip(
                own, self.y[start:stop].split(self.outputs, 1), self.dy[start:stop].split(self.outputs, 1),
                s.chunk(len(own), 1), g.chunk(len(own), 1),
            )  # fmt: skip
            for b, y, dy, inner, slopes in parts:
                stages[1].append(Product(inner, b.t(), y, 0.5, 1))
                stages[2].append(Product(dy, b, slopes, 0.5))
                stages[3].append(Product(dy.t(), inner, torch.empty(b.shape), 0.5))
            stages[3].append(Product(g.t(), rows, torch.empty(a.shape)))
            stages[4].append(Product(g, a, self.dn[start:stop], beta=1))
        return stages


def drawn(*shape: int) -> Tensor:
    return 0.1 * torch.randn(shape).bfloat16()


def one_by_one(products: Sequence[Product]) -> None:
    """As plain torch has it: masters rounded to bf16, a product each; gradients in bf16, then in fp32."""
    for left, given, out, alpha, beta, _ in products:
        right = given.to(left.dtype)
        if out.dtype == left.dtype:
            torch.addmm(out, left, right, beta=beta, alpha=alpha, out=out)
        else:
            tall = left.shape[0] > right.shape[1]
            value = torch.mm(right.t(), left.t()).t() if tall else torch.mm(left, right)
            out.copy_(value).mul_(alpha)


def ranges(tokens: int, members: int, rng: random.Random) -> list[int]:
    """Bounds of ranges that differ by up to half of their length."""
    weights = [1 + rng.random() for _ in range(members)]
    ends = [round(tokens * sum(weights[: at + 1]) / sum(weights)) for at in range(members)]
    return [0, *ends]


def milliseconds(run: Any, stages: Sequence[Sequence[Product]]) -> float:
    start = time.perf_counter()
    for products in stages:
        run(products)
    return 1e3 * (time.perf_counter() - start)


def measured(layer: Layer, tokens: int, members: int, rounds: int) -> dict[str, list[float]]:
    """Lower quartile, median and upper quartile of the milliseconds of all six products."""
    rng = random.Random(0)
    times: dict[str, list[float]] = {"grouped": [], "torch, new": [], "torch, met": []}
    grouped_products(layer.stages(ranges(tokens, members, rng))[0])  # compiled before anything is timed
    for _ in range(rounds):
        stages = layer.stages(ranges(tokens, members, rng))
        times["torch, new"].append(milliseconds(one_by_one, stages))
        times["grouped"].append(milliseconds(grouped_products, stages))
        times["torch, met"].append(milliseconds(one_by_one, stages))
    return {name: [round(q, 3) for q in quantiles(found, n=4)] for name, found in times.items()}


def text(record: dict[str, Any]) -> str:
    """The record for people."""

    def told(three: list[float]) -> str:
        return f"{three[1]:.2f} ({three[0]:.2f}–{three[2]:.2f})"

    rows = [
        [
            row["layer"], str(row["tokens"]), str(row["members"]), *(told(row[name]) for name in SIDES),
            *(f"{row[name][1] / row['grouped'][1]:.2f} ×" for name in SIDES[1:]),
        ]
        for row in record["rows"]
    ]  # fmt: skip
    head = ["layer", "tokens", "members", *(f"{name}, ms" for name in SIDES), "new / grouped", "met / grouped"]
    parts = [
        "# The small products of many adapters, in one call and one by one",
        f"bf16, ranks {', '.join(map(str, RANKS))} in turns. All six products of a layer's forward and backward. "
        f"Medians of {record['rounds']} rounds in turns, quartiles in brackets.",
        table(head, rows),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


SIDES = ("grouped", "torch, new", "torch, met")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(threads())
    rows = [
        {"layer": name, "tokens": tokens, "members": members, **measured(layer, tokens, members, given.rounds)}
        for name, shape in LAYERS.items()
        for tokens in TOKENS
        for members in MEMBERS
        for layer in [Layer(*shape, tokens, members)]
    ]
    record = {"rounds": given.rounds, "rows": rows, "surroundings": surroundings()}
    write_record(BENCHMARKS / "results" / "grouped", record, text(record))
    print(text(record))


if __name__ == "__main__":
    main()
