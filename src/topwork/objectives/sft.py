"""Supervised fine-tuning: the learned tokens' weighted negative log-likelihood, sum_i -w_i log p_i / sum_i w_i.

The sums run over the whole optimizer step, so one pass of eight sequences is eight passes of one.
"""

from dataclasses import dataclass

from torch import Tensor

from topwork.objectives.objective import LinearObjective
from topwork.ops.batch import Labels


@dataclass(frozen=True)
class Sft(LinearObjective):
    """The rows' own weights."""

    def weights(self, labels: Labels) -> Tensor:
        return labels.loss_weights
