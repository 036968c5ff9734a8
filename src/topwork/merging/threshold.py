"""Which differences between a merged model and the unmerged one rounding explains, and which are a mistake.

In fp32 the two differ by the order of summation. In 16 bits the merged weights are rounded once more than the base's
own were, by up to 2^-9 of each in bf16, and the product of the low-rank factors is not: what that does to a model is of
the kind that storing the base in 16 bits does. `benchmarks/merge_rounding.py` measures both; the limits lie well above
what right merges gave. Logits are no measure in 16 bits: the first token of a text, on which attention rests,
multiplies a rounding a hundredfold and is never predicted from.

A lost, a doubled or a misplaced adapter leaves the merged model about as far from the unmerged one as the adapter takes
its base, or further. Where that is over the floor it is refused. An adapter that moves its base no more than
rounding does cannot be told from none by any model's answers in 16 bits: such a merge is kept, and `doubt` says so.
"""

from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

from topwork.merging.verify import Verification

LARGEST_FP32_DIFFERENCE = 1e-4
"""Of the logits in fp32, relative to the largest one."""
LARGEST_FP32_KL = 1e-6
LARGEST_16BIT_KL = 0.05
FLOOR_16BIT_KL = 0.005
"""In nats a token. Up to here rounding explains what differs, whatever the adapter is."""
LEAST_16BIT_AGREEMENT = 0.8
LARGEST_SHARE = 0.5
"""Of how far the adapter takes the base: a merge that is as far from the adapter as half of this has lost it."""


def refusal(found: Verification, dtype: torch.dtype) -> str | None:
    """Why a merged model of a type is not the unmerged one; None where it is, but for rounding. NaN is refused."""
    called = str(dtype).removeprefix("torch.")
    if dtype.itemsize > 2:
        if found.largest_relative_difference <= LARGEST_FP32_DIFFERENCE and found.mean_kl <= LARGEST_FP32_KL:
            return None
        return (
            f"its logits differ by {found.largest_relative_difference:.1e} of the largest one (KL {found.mean_kl:.1e} "
            f"nats a token), and rounding in {called} explains {LARGEST_FP32_DIFFERENCE:.0e} ({LARGEST_FP32_KL:.0e})"
        )
    if found.mean_kl <= FLOOR_16BIT_KL:
        return None
    limit = min(LARGEST_16BIT_KL, LARGEST_SHARE * found.adapter_kl)
    if found.mean_kl <= limit and found.top1_agreement >= LEAST_16BIT_AGREEMENT:
        return None
    return (
        f"KL {found.mean_kl:.2g} nats a token and the same likeliest token in {found.top1_agreement:.1%} of places, "
        f"where rounding in {called} explains {max(limit, FLOOR_16BIT_KL):.2g} and {LEAST_16BIT_AGREEMENT:.0%} (the "
        f"adapter itself is {found.adapter_kl:.2g} from its base)"
    )


def doubt(found: Verification, dtype: torch.dtype) -> str | None:
    """Why a merged model that is not refused may lack its adapter all the same; None where it does not."""
    if dtype.itemsize > 2 or found.mean_kl <= LARGEST_SHARE * found.adapter_kl:
        return None
    called = str(dtype).removeprefix("torch.")
    return (
        f"the adapter moves its base by a KL of {found.adapter_kl:.2g} nats a token, and the merged model lies "
        f"{found.mean_kl:.2g} from the unmerged one, which rounding in {called} does too: the check cannot tell this "
        "merge from one that lost its adapter. Merge in float32 (--dtype float32), where it can, or serve the adapter "
        "beside its base (topwork serve)"
    )


Grade = Literal["same", "unsure", "other weights", "another", "unchecked"]


@dataclass(frozen=True)
class Verdict:
    """Whether a merged model is base + adapter, in a word for programs and a sentence for people.

    same           but for rounding it is
    unsure         rounding is as large as the adapter, so that the check cannot tell
    other weights  it was merged onto others than the adapter was trained on, so that its answers are others too
    another        rounding does not explain what differs: such a merge is refused, unless it is forced
    unchecked      no inputs went through it
    """

    grade: Grade
    text: str

    def as_json(self) -> dict[str, str]:
        """As merge.json has it."""
        return asdict(self)


UNCHECKED = Verdict(
    "unchecked", "nothing says whether it answers as base + adapter does: no inputs were run (--check 0)"
)


def verdict(found: Verification, dtype: torch.dtype, changes_base: bool = False) -> Verdict:
    """What the check found, by the rules above. `changes_base`: the base is another than the adapter was trained on,
    and what the rules ask of is the fold alone."""
    if changes_base:
        return _onto_other_weights(found, dtype)
    measured = _measured(found)
    if (refused := refusal(found, dtype)) is not None:
        return Verdict("another", f"the merged model is not the one that was trained: {refused}")
    if (unsure := doubt(found, dtype)) is not None:
        return Verdict("unsure", f"whether the merged model has its adapter is not certain: {unsure}")
    why = f"rounding to {str(dtype).removeprefix('torch.')}" if dtype.itemsize <= 2 else "the order of summation"
    return Verdict("same", f"the merged model answers as base + adapter does: {measured}, which {why} explains")


def _onto_other_weights(found: Verification, dtype: torch.dtype) -> Verdict:
    """Both numbers: how exact the fold is, and how far the answers have moved from what was trained."""
    fold = found.fold
    if fold is not None and (refused := refusal(replace(found, **vars(fold), fold=None), dtype)) is not None:
        return Verdict("another", f"the merged model is not adapter and 16-bit weights together: {refused}")
    exact = (
        "the fold onto the 16-bit weights is exact but for rounding (logits within "
        f"{fold.largest_relative_difference:.1e} of the largest one, KL {fold.mean_kl:.2g} nats a token)"
        if fold is not None
        else "the adapter was folded into the 16-bit weights"
    )
    losses = (found.unmerged_perplexity, found.merged_perplexity)
    moved = f", perplexity {losses[0]:.4g} -> {losses[1]:.4g}" if None not in losses else ""
    return Verdict(
        "other weights",
        f"{exact}; but these are other weights than the adapter was trained on, as was asked, and the answers have "
        f"moved from those of the run: logits by up to {found.largest_relative_difference:.1e} of the largest one, "
        f"{_measured(found)}{moved}. --base dequantized keeps the run's; measure what this one is worth with topwork "
        "eval --model",
    )


def _measured(found: Verification) -> str:
    return f"the same likeliest token in {found.top1_agreement:.1%} of places, KL {found.mean_kl:.2g} nats a token"
