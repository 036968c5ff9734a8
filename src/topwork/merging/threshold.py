"""Which differences between a merged model and the unmerged one rounding explains."""

import torch

from topwork.merging.verify import Verification

LARGEST_FP32_DIFFERENCE = 1e-5
"""Of the logits in fp32, relative to the largest one."""
LARGEST_16BIT_KL = 0.05
LEAST_16BIT_AGREEMENT = 0.8


def refusal(found: Verification, dtype: torch.dtype) -> str | None:
    """Why a merged model of a type is not the unmerged one; None where it is, but for rounding. NaN is refused."""
    if dtype.itemsize > 2:
        if found.largest_relative_difference <= LARGEST_FP32_DIFFERENCE:
            return None
        return (
            f"its logits differ by {found.largest_relative_difference:.1e} of the largest one, and rounding in "
            f"{str(dtype).removeprefix('torch.')} explains {LARGEST_FP32_DIFFERENCE:.0e}"
        )
    if found.mean_kl <= LARGEST_16BIT_KL and found.top1_agreement >= LEAST_16BIT_AGREEMENT:
        return None
    return (
        f"KL {found.mean_kl:.2g} nats a token and the same likeliest token in {found.top1_agreement:.1%} of places, "
        f"and rounding in {str(dtype).removeprefix('torch.')} explains {LARGEST_16BIT_KL} and "
        f"{LEAST_16BIT_AGREEMENT:.0%}"
    )
