"""Attention of a flat batch, forward and backward: the C kernel, our plain torch, and PyTorch's fused kernel called
once per sequence.

    python benchmarks/attention.py

Nine heads over three, 64 wide. Milliseconds are medians of the turns, with the least and the most in brackets; the
three run in turns. The last column is the largest relative difference (norms) of output and gradients between the
kernel and the fused one. Writes benchmarks/results/attention.*
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import BENCHMARKS, surroundings, surroundings_text, table, threads, write_record
from topwork.ops.attention import attention_backward, attention_forward
from topwork.ops.attention_reference import AttentionRule, backward_reference, forward_reference

SHAPES = {
    "9 of 150-300 tokens": [150, 170, 190, 210, 230, 250, 270, 290, 300],
    "16 of 40 and 16 of 60": [40] * 16 + [60] * 16,
    "64 of 32": [32] * 64,
    "1 of 2,048": [2048],
}
RULE = AttentionRule(0.125)
TURNS = 9

Bounds = tuple[int, ...]
Timing = tuple[float, float, list[Tensor]]
"""Milliseconds forward and backward; the output and the gradients of query, key and value."""


def fused(inputs: list[Tensor], grad: Tensor, bounds: Bounds) -> Timing:
    leaves = [x.detach().requires_grad_() for x in inputs]
    start = time.perf_counter()
    parts = []
    for first, stop in zip(bounds, bounds[1:]):
        own = [x[first:stop].transpose(0, 1)[None] for x in leaves]
        parts.append(F.scaled_dot_product_attention(*own, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    out = torch.cat(parts)
    middle = time.perf_counter()
    grads = torch.autograd.grad(out, leaves, grad)
    return *spent(start, middle), [out.detach(), *grads]


def plain(inputs: list[Tensor], grad: Tensor, bounds: Bounds) -> Timing:
    query, key, value = inputs
    into = [torch.empty_like(x) for x in inputs]
    start = time.perf_counter()
    out = forward_reference(query, key, value, bounds, RULE)
    middle = time.perf_counter()
    backward_reference(grad, query, key, value, out, bounds, RULE, None, into)
    return *spent(start, middle), [out, *into]


def kernel(inputs: list[Tensor], grad: Tensor, bounds: Bounds) -> Timing:
    query, key, value = inputs
    start = time.perf_counter()
    out, lse = attention_forward(query, key, value, bounds, RULE)
    middle = time.perf_counter()
    grads = attention_backward(grad, query, key, value, out, lse, bounds, RULE)[:3]
    return *spent(start, middle), [out, *grads]


ARMS: dict[str, Callable[[list[Tensor], Tensor, Bounds], Timing]] = {"kernel": kernel, "plain": plain, "fused": fused}


def spent(start: float, middle: float) -> tuple[float, float]:
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads())
    rows = []
    for name, lengths in SHAPES.items():
        bounds = (0, *torch.tensor(lengths).cumsum(0).tolist())
        for dtype in (torch.bfloat16, torch.float32):
            rows.append({"sequences": name, "type": str(dtype)[6:], **measured(bounds, dtype)})
    record = {"turns": TURNS, "rows": rows, "surroundings": surroundings()}
    write_record(BENCHMARKS / "results" / "attention", record, text(record))
    print(text(record))


def measured(bounds: Bounds, dtype: torch.dtype) -> dict[str, Any]:
    """Of each arm every turn's milliseconds, forward and backward; and the kernel's difference from the fused one."""
    inputs = [torch.randn(bounds[-1], heads, 64, dtype=dtype) for heads in (9, 3, 3)]
    grad = torch.randn(bounds[-1], 9, 64, dtype=dtype)
    turns = [{arm: call(inputs, grad, bounds) for arm, call in ARMS.items()} for _ in range(TURNS + 1)][1:]
    took = {arm: [[round(turn[arm][i], 3) for turn in turns] for i in (0, 1)] for arm in ARMS}
    pairs = zip(turns[-1]["kernel"][2], turns[-1]["fused"][2])
    worst = max(float((ours - theirs).float().norm() / theirs.float().norm()) for ours, theirs in pairs)
    return {**took, "difference": worst}


def text(record: dict[str, Any]) -> str:
    """The record for people."""

    def ratio(row: dict[str, Any], arm: str) -> str:
        ours, theirs = (sum(map(median, row[name])) for name in ("kernel", arm))
        return f"{theirs / ours:.1f} ×"

    rows = [
        [
            row["sequences"], row["type"], *(" + ".join(map(cell, row[arm])) for arm in ARMS), ratio(row, "plain"),
            ratio(row, "fused"), f"{row['difference']:.1e}",
        ]
        for row in record["rows"]
    ]  # fmt: skip
    head = ["sequences", "type", "kernel: forward + backward, ms", "plain torch, ms", "fused, ms", "plain / kernel"]
    parts = [
        "# Attention of a flat batch: the C kernel, plain torch, and the fused kernel sequence by sequence",
        f"Nine heads over three, 64 wide. Medians of {record['turns']} turns, the least and the most in brackets.",
        table([*head, "fused / kernel", "difference"], rows),
        surroundings_text(record["surroundings"]),
    ]
    return "\n\n".join(parts) + "\n"


def cell(times: list[float]) -> str:
    return f"{median(times):.1f} ({min(times):.1f}-{max(times):.1f})"


if __name__ == "__main__":
    main()
