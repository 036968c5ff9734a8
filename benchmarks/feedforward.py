"""A gated feed-forward layer with its adapter's terms, forward and backward: in one step, and product by product.

    python benchmarks/feedforward.py [--layers 20] [--rounds 9] [--out OUT]

Both ways are autograd Functions, given the same tensors: `ops/feedforward.py`, which is for AMX, and the two groups of
`ops/project.py` with a gated unit between them. As in a model every layer has weights, an input and kept gates of its
own, so that none are in a cache when its turn comes; the ways take turns layer by layer. bf16, LoRA r = 16, weights
dense and in NF4. Milliseconds a layer, lower quartile, median and upper quartile. Prints Markdown, and writes OUT.json
and OUT.md where asked to.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from common import surroundings, surroundings_text, table, threads, write_record
from topwork.ops.bundles import LowRank
from topwork.ops.context import training_pass
from topwork.ops.feedforward import feedforward, feedforward_of
from topwork.ops.packed import pack_4bit
from topwork.ops.project import project
from topwork.ops.projection import Projection
from topwork.ops.prologues import Gated
from topwork.ops.workspace import Workspace

SHAPES = {"SmolLM2-135M": (576, 1536), "SmolLM2-360M": (960, 2560), "Qwen2.5-0.5B": (896, 4864)}
TOKENS = (512, 2048)
RANK = 16
WAYS = ("one step", "product by product")


class Layer:
    """Gate, up and down with an adapter's terms, and an input."""

    def __init__(self, d: int, f: int, tokens: int, packed: bool) -> None:
        both = drawn(2 * f, d)
        weights = [both[:f], both[f:], drawn(d, f)]
        held = [pack_4bit(w, "nf4", 64, True) for w in weights] if packed else weights
        low = [LowRank(0, tokens, learned(RANK, w.shape[1]), learned(w.shape[0], RANK), 2.0) for w in weights]
        self.gate, self.up, self.down = (Projection(w, None, (term,)) for w, term in zip(held, low))
        self.joined = None if packed else Projection(both)
        self.x = drawn(tokens, d).requires_grad_()

    def in_one_step(self) -> Tensor:
        whole = feedforward_of(self.x, (self.gate, self.up), self.down, "silu")
        if whole is None:
            sys.exit("a layer is one step on processors with AMX, and this one has none, or it is not used")
        return feedforward(self.x, whole, keeps=False)

    def by_products(self) -> Tensor:
        buffer = project(self.x, (self.gate, self.up), joined=self.joined)
        return project(buffer, (self.down,), Gated("silu", in_place=True), keeps=False)


def drawn(*shape: int) -> Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).bfloat16()


def learned(*shape: int) -> Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).requires_grad_()


def milliseconds(way: Callable[[], Tensor], dy: Tensor, workspace: Workspace) -> tuple[float, float]:
    """Forward and backward."""
    with training_pass(workspace):
        start = time.perf_counter()
        y = way()
        middle = time.perf_counter()
        y.backward(dy)
        return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def measured(name: str, tokens: int, packed: bool, given: argparse.Namespace) -> dict[str, Any]:
    layers = [Layer(*SHAPES[name], tokens, packed) for _ in range(given.layers)]
    spaces, dy = [Workspace() for _ in layers], drawn(tokens, SHAPES[name][0])
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for number in range(given.rounds + 1):
        for layer, workspace in zip(layers, spaces):
            for way, run in zip(WAYS, (layer.in_one_step, layer.by_products)):
                found = milliseconds(run, dy, workspace)
                if number:
                    times[way].append(found)
    return {
        "layer": name, "tokens": tokens, "weights": "nf4" if packed else "bf16",
        **{way: [[round(q, 3) for q in quantiles(of, n=4)] for of in zip(*found)] for way, found in times.items()},
    }  # fmt: skip


def text(record: dict[str, Any]) -> str:
    """The record for people."""

    def told(three: list[float]) -> str:
        return f"{three[1]:.2f} ({three[0]:.2f}–{three[2]:.2f})"

    rows = []
    for row in record["rows"]:
        ours, others = (row[way] for way in WAYS)
        ratio = sum(of[1] for of in ours) / sum(of[1] for of in others)
        times = [told(of) for pair in zip(ours, others) for of in pair]
        rows.append([row["layer"], row["weights"], str(row["tokens"]), *times, f"{ratio:.2f}"])
    head = [f"{where}: {way}, ms" for where in ("forward", "backward") for way in WAYS]
    parts = [
        "# A feed-forward layer in one step, and product by product",
        f"bf16, LoRA r = {RANK}; {record['layers']} layers in turns, {record['rounds']} rounds; medians, quartiles in "
        "brackets. The last column is one step's time over that of single products, forward and backward.",
        table(["layer", "weights", "tokens", *head, "of the time"], rows),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="the record's path without its ending; left out, it is only printed")
    given = parser.parse_args()
    torch.set_num_threads(threads())
    torch.manual_seed(0)
    record: dict[str, Any] = {"layers": given.layers, "rounds": given.rounds, "rows": []}
    for name in SHAPES:
        for tokens in TOKENS:
            for packed in (False, True):
                record["rows"].append(measured(name, tokens, packed, given))
    record["surroundings"] = surroundings()
    if given.out:
        write_record(given.out, record, text(record))
    print(text(record))


if __name__ == "__main__":
    main()
