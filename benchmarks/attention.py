"""Attention of a flat stream, forward and backward: ours beside PyTorch's fused kernel called once per sequence.

    python benchmarks/attention.py

Nine heads over three, 64 wide. Milliseconds are medians of seven turns, the two in turns; the last column is the
largest relative difference (norms) of output and gradients.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.attention import AttentionRule, flat_attention

SHAPES = {
    "9 of 150-300 tokens": [150, 170, 190, 210, 230, 250, 270, 290, 300],
    "16 of 40 and 16 of 60": [40] * 16 + [60] * 16,
    "1 of 2,048": [2048],
}
TURNS = 7


def fused(q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...]) -> Tensor:
    parts = []
    for start, stop in zip(bounds, bounds[1:]):
        own = [x[start:stop].repeat_interleave(9 // x.shape[1], 1).transpose(0, 1)[None] for x in (q, k, v)]
        parts.append(F.scaled_dot_product_attention(*own, is_causal=True)[0].transpose(0, 1))
    return torch.cat(parts)


def timed(call: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor) -> tuple[float, float, list[Tensor]]:
    for x in inputs:
        x.grad = None
    start = time.perf_counter()
    out = call()
    middle = time.perf_counter()
    out.backward(grad)
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle), [out.detach(), *(x.grad for x in inputs)]


def main() -> None:
    torch.manual_seed(0)
    print("| sequences | type | fused per sequence: forward + backward, ms | ours, ms | difference |")
    print("|---|---|---|---|---|")
    for name, lengths in SHAPES.items():
        bounds = (0, *torch.tensor(lengths).cumsum(0).tolist())
        for dtype in (torch.bfloat16, torch.float32):
            print(f"| {name} | {str(dtype)[6:]} | {measured(bounds, dtype)} |", flush=True)


def measured(bounds: tuple[int, ...], dtype: torch.dtype) -> str:
    inputs = [torch.randn(bounds[-1], heads, 64, dtype=dtype).requires_grad_() for heads in (9, 3, 3)]
    grad = torch.randn(bounds[-1], 9, 64, dtype=dtype)
    arms = {
        "fused": lambda: fused(*inputs, bounds),
        "ours": lambda: flat_attention(*inputs, bounds, AttentionRule(0.125)),
    }
    turns = [{arm: timed(call, inputs, grad) for arm, call in arms.items()} for _ in range(TURNS)]
    cells = [" + ".join(f"{median(turn[arm][i] for turn in turns):,.0f}" for i in (0, 1)) for arm in arms]
    pairs = zip(turns[-1]["ours"][2], turns[-1]["fused"][2])
    worst = max(float((ours - theirs).float().norm() / theirs.float().norm()) for ours, theirs in pairs)
    return f"{cells[0]} | {cells[1]} | {worst:.1e}"


if __name__ == "__main__":
    main()
