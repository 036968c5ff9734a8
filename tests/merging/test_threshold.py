"""Which merges are refused, and of which it is said that the check cannot tell."""

import pytest
import torch

from topwork.merging.threshold import doubt, refusal
from topwork.merging.verify import Verification

BF16, FP32 = torch.bfloat16, torch.float32


def found(kl: float, adapter_kl: float, agreement: float = 0.98, relative: float = 1e-5) -> Verification:
    return Verification(0.1, relative, 0.1, agreement, kl, adapter_kl, None, None, 1.0, 1.0, 10)


@pytest.mark.parametrize(
    ("kl", "adapter_kl"), [(0.003, 0.003), (0.0014, 0.0014), (0.002, 0.0), (0.004, 0.005)]
)  # fmt: skip
def test_a_light_adapter_is_not_said_to_be_kept_where_rounding_is_as_large(kl: float, adapter_kl: float) -> None:
    assert refusal(found(kl, adapter_kl), BF16) is None
    told = doubt(found(kl, adapter_kl), BF16)
    assert told is not None
    assert "lost its adapter" in told
    assert "--dtype float32" in told


def test_a_merge_that_is_nearer_than_half_the_adapter_is_no_doubt() -> None:
    assert doubt(found(0.002, 0.06), BF16) is None
    assert doubt(found(1e-7, 0.0), FP32) is None


@pytest.mark.parametrize("adapter_kl", [0.006, 0.05, 0.5])
def test_a_lost_adapter_over_the_floor_is_refused(adapter_kl: float) -> None:
    assert "KL" in (refusal(found(adapter_kl, adapter_kl), BF16) or "")
    assert refusal(found(adapter_kl / 10, adapter_kl), BF16) is None
