"""The loss with its gradient by the hidden states: what a pass over the logits costs, and how large a chunk should be.

    OMP_NUM_THREADS=1 python benchmarks/loss.py [--rows 1200] [--width 576] [--vocabulary 49152]

Random bf16 states and a frozen bf16 head. Milliseconds are medians of five turns, all arms in turns: log-probabilities
and gradient together with the native pass and chunks of so many rows, and once in plain torch (fp32 logits of a chunk,
logsumexp, exp, scatter, product, cast), which is the native pass's truth. The last column is that arm's time over this
one's. `products` is what the two products alone take at that chunk.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch
from torch import Tensor

from topwork.ops import logprobs
from topwork.ops.logprobs import LogitRule, dense_head, log_probabilities

CHUNKS = (96, 128, 196, 256, 384, 512)
TURNS = 5


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 1200), ("width", 576), ("vocabulary", 49152)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.manual_seed(0)
    hidden = torch.randn(given.rows, given.width).bfloat16()
    weight = (torch.randn(given.vocabulary, given.width) / given.width**0.5).bfloat16()
    targets = torch.randint(0, given.vocabulary, (given.rows,))
    gradient = torch.full((given.rows,), -1.0 / given.rows)
    inputs = (hidden, weight, targets, gradient)
    arms: dict[tuple[str, int], Callable[[], None]] = {("plain torch", 196): partial(loss, 196, PlainTorch(), *inputs)}
    for chunk in CHUNKS:
        arms["native", chunk] = partial(loss, chunk, LogitRule(), *inputs)
        arms["products", chunk] = partial(products, chunk, hidden, weight)
    turns = [{name: timed(arm) for name, arm in arms.items()} for _ in range(TURNS)]
    took = {name: median(turn[name] for turn in turns) for name in arms}
    plain = took["plain torch", 196]
    print(f"{given.rows} rows, {given.width} wide, vocabulary {given.vocabulary}, {torch.get_num_threads()} threads\n")
    print("| pass | rows in a chunk | ms | products, ms | plain torch / this |\n|---|---:|---:|---:|---:|")
    print(f"| plain torch | 196 | {plain:,.0f} | {took['products', 196]:,.0f} | 1.00 |")
    for chunk in CHUNKS:
        ours = took["native", chunk]
        print(f"| native | {chunk} | {ours:,.0f} | {took['products', chunk]:,.0f} | {plain / ours:.2f} |")


if __name__ == "__main__":
    main()
