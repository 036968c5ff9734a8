"""The lengths of the rows of W + s B A, for the work of r values a row: the sum is never made.

    n^2 = |W|^2 + 2 s sum(B * P) + s^2 sum(B * (B C))        row by row; P = W A', C = A A'

In fp32, as n is more exact than the layer's own product, and has to be: DoRA divides by it.
"""

import torch
from torch import Tensor

from topwork.ops.native.load import told
from topwork.ops.triton import load as triton


def row_lengths(squares: Tensor, b: Tensor, across: Tensor, gram: Tensor, scaling: float) -> Tensor:
    """n [out] fp32, without a gradient: squares [out] is |W|^2, b [out, r], across [out, r] is P (of any float type),
    gram [r, r] is C. Raises ValueError for other shapes."""
    outputs, r = b.shape
    if squares.shape != (outputs,) or across.shape != b.shape or gram.shape != (r, r):
        raise ValueError(
            f"squares {told(squares)}, across {told(across)} and gram {told(gram)} do not belong to b {told(b)}: "
            f"expected [{outputs}], [{outputs}, {r}] and [{r}, {r}]"
        )
    plain = all(x.dtype == torch.float32 and x.is_contiguous() for x in (squares, b, gram))
    if plain and (kernels := triton.kernels("row_lengths", across)):
        return kernels.row_lengths(squares, b, across, gram, scaling)
    return row_lengths_reference(squares, b, across, gram, scaling)


def row_lengths_reference(squares: Tensor, b: Tensor, across: Tensor, gram: Tensor, scaling: float) -> Tensor:
    """The truth."""
    own = (b * (b @ gram)).sum(1)
    squared = squares + 2 * scaling * (b * across.float()).sum(1) + scaling**2 * own
    return squared.clamp_min(torch.finfo(torch.float32).tiny).sqrt()
