"""A weight with an adapter's part in it, in fp32, and rounded once to the type in which it is kept.

LoRA    W' = W + s B A
DoRA    W' = m / |W + s B A| (W + s B A)
IA3     W' = l W, b' = l b, or W' = W l for a module whose inputs are scaled
BitFit  b' the learned bias
"""

import torch
from torch import Tensor

from topwork.adapters.module import AdapterModule
from topwork.common.errors import RunError

MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def folded(part: AdapterModule, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A module's weight [out, in] (an embedding's [V, d]) in fp32, or more, and its bias with a part in them. Raises
    AdapterError for a part that cannot be merged."""
    return part.merged(weight.to(torch.promote_types(weight.dtype, torch.float32)), bias)


def as_stored(name: str, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum in the type in which it is kept. Raises RunError, calling it by `name`, where it is not finite."""
    merged = exact.to(dtype)
    if not torch.isfinite(merged).all():
        wider = "" if dtype is torch.float32 else "merge in float32, and "
        raise RunError(
            f"{name}: weight and adapter add up to a value that is not finite in {str(dtype).removeprefix('torch.')}; "
            f"{wider}look whether the adapter holds NaN or values that are far too large"
        )
    return merged
