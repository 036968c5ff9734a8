"""The loss with its gradient by the hidden states: what a pass over the logits costs, and how large a chunk should be.

    OMP_NUM_THREADS=1 python benchmarks/loss.py [--rows 1200] [--width 576] [--vocabulary 49152]

Random bf16 states and a frozen bf16 head. Milliseconds are medians of five turns, all arms in turns: log-probabilities
and gradient together with the native pass and chunks of so many rows, and once in plain torch (fp32 logits of a chunk,
logsumexp, exp, scatter, product, cast), which is the native pass's truth. The last column is that arm's time over this
one's. `products` is what the two products alone take at that chunk. Then, over states and a head in fp32, how far both
are from fp64. Writes benchmarks/results/loss.*
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from common import BENCHMARKS, surroundings, surroundings_text, table, threads, write_record
from topwork.ops import logprobs
from topwork.ops.logprobs import LogitRule, dense_head, log_probabilities

CHUNKS = (96, 128, 196, 256, 384, 512)
EAGER = "plain torch"
EAGER_CHUNK = 196
TURNS = 5
EXACT_ROWS = 256


@contextmanager
def chunks_of(rows: int, vocabulary: int) -> Iterator[None]:
    before = logprobs.CHUNK_ROWS["cpu"], logprobs.CHUNK_BYTES["cpu"]
    logprobs.CHUNK_ROWS["cpu"], logprobs.CHUNK_BYTES["cpu"] = rows, rows * vocabulary * 2
    try:
        yield
    finally:
        logprobs.CHUNK_ROWS["cpu"], logprobs.CHUNK_BYTES["cpu"] = before


class PlainTorch(LogitRule):
    """The rule with the truth in the place of the native pass."""

    def log_probabilities(self, products: Tensor, targets: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return logprobs.logprob_slope_reference(products, targets, gradient)


def loss(chunk: int, rule: LogitRule, hidden: Tensor, weight: Tensor, targets: Tensor, gradient: Tensor) -> None:
    with chunks_of(chunk, len(weight)):
        log_probabilities(hidden.detach().requires_grad_(), dense_head(weight), targets, rule, gradient)


def products(chunk: int, hidden: Tensor, weight: Tensor) -> None:
    pieces = -(-len(hidden) // chunk)
    buffer = torch.empty(-(-len(hidden) // pieces), len(weight), dtype=hidden.dtype)
    for rows in hidden.chunk(pieces):
        torch.mm(torch.mm(rows, weight.t(), out=buffer[: len(rows)]), weight)


def timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def errors(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, dict[str, float]]:
    """In fp32, against fp64: errors of the log-probabilities in nats, and of the hidden states' gradient (norms)."""
    hidden, targets, weight = hidden[:EXACT_ROWS].float(), targets[:EXACT_ROWS], weight.float()
    rows = torch.arange(len(hidden))
    logits = hidden.double() @ weight.double().t()
    exact = torch.log_softmax(logits, -1)[rows, targets]
    slope = -torch.softmax(logits, -1)
    slope[rows, targets] += 1
    expected = slope @ weight.double()
    found = {}
    for name, rule in (("native", LogitRule()), (EAGER, PlainTorch())):
        leaf = hidden.detach().requires_grad_()
        logps = log_probabilities(leaf, dense_head(weight), targets, rule, torch.ones(len(leaf)))
        logps.sum().backward()
        found[name] = {
            "mean_error_nats": float((logps.detach() - exact).mean()),
            "largest_error_nats": float((logps.detach() - exact).abs().max()),
            "gradient_error": float((leaf.grad - expected).norm() / expected.norm()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 1200), ("width", 576), ("vocabulary", 49152)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(threads())
    hidden = torch.randn(given.rows, given.width).bfloat16()
    weight = (torch.randn(given.vocabulary, given.width) / given.width**0.5).bfloat16()
    targets = torch.randint(0, given.vocabulary, (given.rows,))
    gradient = torch.full((given.rows,), -1.0 / given.rows)
    inputs = (hidden, weight, targets, gradient)
    arms: dict[tuple[str, int], Callable[[], None]] = {
        (EAGER, EAGER_CHUNK): partial(loss, EAGER_CHUNK, PlainTorch(), *inputs)
    }
    for chunk in CHUNKS:
        arms["native", chunk] = partial(loss, chunk, LogitRule(), *inputs)
        arms["products", chunk] = partial(products, chunk, hidden, weight)
    turns = [{name: timed(arm) for name, arm in arms.items()} for _ in range(TURNS)]
    rows = [
        {"pass": name, "chunk": chunk, "ms": [round(turn[name, chunk], 2) for turn in turns]} for name, chunk in arms
    ]
    record = {
        **vars(given), "turns": TURNS, "arms": rows, "errors": errors(hidden, weight, targets),
        "surroundings": surroundings(),
    }  # fmt: skip
    write_record(BENCHMARKS / "results" / "loss", record, text(record))
    print(text(record))


def text(record: dict[str, Any]) -> str:
    """The record for people."""
    took = {(row["pass"], row["chunk"]): median(row["ms"]) for row in record["arms"]}
    eager = took[EAGER, EAGER_CHUNK]
    rows = [
        [name, str(chunk), f"{ms:,.0f}", f"{took['products', chunk]:,.0f}", f"{eager / ms:.2f}"]
        for (name, chunk), ms in took.items()
        if name != "products"
    ]
    errors = [
        [name, f"{row['mean_error_nats']:.1e}", f"{row['largest_error_nats']:.1e}", f"{row['gradient_error']:.1e}"]
        for name, row in record["errors"].items()
    ]
    parts = [
        "# The loss and its gradient by the hidden states",
        f"{record['rows']} rows, {record['width']} wide, vocabulary {record['vocabulary']}, bf16; medians of "
        f"{record['turns']} turns.",
        table(["pass", "rows in a chunk", "ms", "products, ms", "plain torch / this"], rows),
        f"In fp32 beside fp64, {EXACT_ROWS} rows:",
        table(["pass", "mean error, nats", "largest, nats", "gradient, of its norm"], errors),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
