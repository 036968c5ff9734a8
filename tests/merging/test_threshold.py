"""Which merges are refused, of which it is said that the check cannot tell, and what people are told of each."""

import pytest
import torch

from topwork.merging.threshold import doubt, refusal, verdict
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


@pytest.mark.parametrize(
    ("checked", "dtype", "grade", "words"),
    [
        (found(1e-7, 0.3), FP32, "same", "answers as base + adapter does: the same likeliest token in 98.0% of places"),
        (found(1e-7, 0.3), FP32, "same", "which the order of summation explains"),
        (found(0.002, 0.3), BF16, "same", "KL 0.002 nats a token, which rounding to bfloat16 explains"),
        (found(0.004, 0.005), BF16, "unsure", "is not certain: the adapter moves its base by a KL of 0.005"),
        (found(0.2, 0.3), BF16, "another", "is not the one that was trained: KL 0.2"),
        (found(1e-7, 0.3, relative=1e-2), FP32, "another", "its logits differ by"),
        (found(float("nan"), 0.3), BF16, "another", "is not the one that was trained"),
    ],
)
def test_the_verdict_follows_the_rules_and_says_so(
    checked: Verification, dtype: torch.dtype, grade: str, words: str
) -> None:
    judged = verdict(checked, dtype)
    assert judged.grade == grade
    assert words in judged.text
    refused, unsure = refusal(checked, dtype) is not None, doubt(checked, dtype) is not None
    assert (judged.grade == "another", judged.grade == "unsure") == (refused, unsure and not refused)
    assert verdict(checked, dtype, changes_base=True).grade == "other weights"
