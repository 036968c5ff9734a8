"""log p(target) of rows of logits on the GPU, and in their place how that moves with them; formulas: `ops/logprobs.py`.

A program has one row. It reads it twice: for the largest logit and the sum of exponentials (of what came so far, the
sum made smaller whenever a larger logit comes), then for the slope that is written in its place; the second time it
comes from the L2 cache. A target beyond the vocabulary gives NaN, since looking for one would wait for the GPU.
"""
# mypy: allow-untyped-defs
# Triton reads a kernel's annotations itself: only `tl.constexpr` may stand there.

import torch
import triton
import triton.language as tl
from torch import Tensor

from topwork.ops.triton.sizes import power_of_2

COLUMNS = 8192
"""Logits a program holds at once: 16 to a thread."""


@triton.jit
def _logprob_slope(logits, row_stride, targets, gradient, logps, vocabulary, scale, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocabulary)
    wanted = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32) * scale

    most = -3.4e38  # below every logit but -inf, for which -inf - most is -inf too
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        keep = column < vocabulary
        z = tl.load(logits + column, mask=keep, other=0.0).to(tl.float32) * scale
        z = tl.where(keep, z, float("-inf"))
        larger = tl.maximum(most, tl.max(z, 0))
        total = total * tl.exp(most - larger) + tl.exp(z - larger)
        most = larger
    sum_of_exp = tl.sum(total, 0)
    tl.store(logps + row, wanted - most - tl.log(sum_of_exp))

    weight = tl.load(gradient + row) * scale
    share = 1.0 / sum_of_exp
    for start in range(0, vocabulary, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        keep = column < vocabulary
        z = tl.load(logits + column, mask=keep, other=0.0).to(tl.float32) * scale
        slope = weight * (tl.where(column == target, 1.0, 0.0) - tl.exp(z - most) * share)
        tl.store(logits + column, slope.to(logits.dtype.element_ty), mask=keep)


def logprob_slope_(logits: Tensor, targets: Tensor, gradient: Tensor, scale: float) -> Tensor:
    """fp32 log-probabilities [n] of logits [n, V] with contiguous rows, which become the slope."""
    rows, vocabulary = logits.shape
    logps = torch.empty(rows, device=logits.device)
    columns = min(COLUMNS, power_of_2(vocabulary))
    if rows:
        with torch.cuda.device_of(logits):
            _logprob_slope[(rows,)](
                logits, logits.stride(0), targets.contiguous(), gradient.contiguous(), logps, vocabulary, scale,
                COLUMNS=columns, num_warps=max(1, columns // 512), enable_fp_fusion=False,
            )  # fmt: skip
    return logps
