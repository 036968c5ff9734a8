"""How far two results are apart."""

from collections.abc import Sequence

import torch
from torch import Tensor


def relative(found: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor], least: float = 1e-300) -> float:
    """|found - expected| / |expected|, over all tensors together, in float64.

    `least` is a norm below which `expected` is rounding's own noise; it then stands in the denominator.
    """
    left, right = (
        torch.cat([x.detach().double().flatten() for x in ([side] if isinstance(side, Tensor) else side)])
        for side in (found, expected)
    )
    return float((left - right).norm() / right.norm().clamp_min(least))
