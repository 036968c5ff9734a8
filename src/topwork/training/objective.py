"""What is learned, as pure functions of log-probabilities: `objective(logprobs, batch) -> Loss`."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from topwork.ops.stream import Stream


@dataclass(frozen=True)
class Loss:
    """A pass's summed loss, what to divide the step's sum by in the end, and figures to show (already summed)."""

    total: Tensor
    count: float
    metrics: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """A loss over the log-probabilities of a stream's targets."""

    def gradient(self, batch: Stream) -> Tensor | None:
        """d total / d logprobs [N], where it does not depend on them; else None."""
        ...

    def __call__(self, logprobs: Tensor, batch: Stream) -> Loss:
        """The pass's loss; nothing is divided here."""
        ...


class Sft:
    """Supervised fine-tuning: the learned tokens' weighted negative log-likelihood, sum_i -w_i log p_i / sum_i w_i.

    The sums run over the whole optimizer step, so one pass of eight sequences is eight passes of one.
    """

    def gradient(self, batch: Stream) -> Tensor:
        return -batch.weights

    def __call__(self, logprobs: Tensor, batch: Stream) -> Loss:
        return Loss(-(batch.weights * logprobs).sum(), float(batch.weights.sum()))


OBJECTIVES: dict[str, type[Sft]] = {"sft": Sft}
