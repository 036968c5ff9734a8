"""The residual sum and its rounded branch on the GPU; formula and contract: `ops/residual.py`.

One pass over memory that waits for nothing else: each value is read and written once, 16 of them to a thread. Offsets
are 64 bits wide, for a stream of 16,384 tokens times 8,192 values is within a factor of 16 of what 32 bits count.
"""
# mypy: allow-untyped-defs
# Triton reads a kernel's annotations itself: only `tl.constexpr` may stand there.

import torch
import triton
import triton.language as tl
from torch import Tensor

from topwork.ops.triton.sizes import cdiv

VALUES = 2048
"""To a program."""


@triton.jit
def _add_and_round(
    x, y, total, rounded, count, multiplier, by, ADDS: tl.constexpr, ROUNDS: tl.constexpr, VALUES: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    keep = at < count
    value = tl.load(x + at, mask=keep, other=0.0)
    if ADDS:
        value += tl.load(y + at, mask=keep, other=0.0).to(tl.float32) * multiplier
        tl.store(total + at, value, mask=keep)
    if ROUNDS:
        tl.store(rounded + at, (value * by).to(rounded.dtype.element_ty), mask=keep)


def add_and_round(
    x: Tensor, y: Tensor | None, multiplier: float, total: Tensor, rounded: Tensor | None, by: float
) -> None:
    """Fills `total` and `rounded`; all are contiguous, and those that are not given stand for x unread."""
    if x.numel() and not (y is None and rounded is None):
        with torch.cuda.device_of(x):
            _add_and_round[(cdiv(x.numel(), VALUES),)](
                x, x if y is None else y, total, x if rounded is None else rounded, x.numel(), multiplier, by,
                ADDS=y is not None, ROUNDS=rounded is not None, VALUES=VALUES, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
