"""What is learned, as pure functions of log-probabilities: `objective(logprobs, labels) -> Loss`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Protocol

from torch import Tensor

from topwork.models.base import Base
from topwork.ops.batch import Batch, Labels

Fill = Callable[[Base, Batch], Tensor]
"""Makes a column [N] of a batch's labels before the step, without a gradient; dropout is on where it is in the step."""


@dataclass(frozen=True)
class Loss:
    """A pass's summed loss, what to divide the step's sum by in the end, and sums that are divided so and shown.

    total    a scalar, with the gradient
    count    what the loss is a mean over: weights of tokens, pairs …
    metrics  by name: scalars without a gradient (tensors stay where they are until the step is over)
    """

    total: Tensor
    count: float
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)


class Objective(Protocol):
    """A loss over the log-probabilities [N] of a batch's labels. Its options are its fields.

    columns  what it reads of the labels beside weights, by name, and how a pass without a gradient makes each before
             the step; columns that come with the rows need no entry
    """

    columns: ClassVar[Mapping[str, Fill]]

    def weights(self, labels: Labels) -> Tensor | None:
        """w [N] where the loss is -sum_i w_i logprobs_i, so that the gradient is known beforehand; else None."""
        ...

    def __call__(self, logprobs: Tensor, labels: Labels) -> Loss:
        """The loss of these labels; nothing is divided here."""
        ...


class LinearObjective:
    """An objective that is a weighted sum of log-probabilities. `weights` is all there is to it."""

    columns: ClassVar[Mapping[str, Fill]] = MappingProxyType({})

    def weights(self, labels: Labels) -> Tensor:
        """w [N]."""
        raise NotImplementedError

    def count(self, labels: Labels) -> float:
        """What the loss is a mean over."""
        return float(labels.on_host.loss_weights.sum())

    def __call__(self, logprobs: Tensor, labels: Labels) -> Loss:
        return Loss(-(self.weights(labels) * logprobs).sum(), self.count(labels))


class NonlinearObjective:
    """An objective whose gradient depends on the log-probabilities. `__call__` is all there is to it."""

    columns: ClassVar[Mapping[str, Fill]] = MappingProxyType({})

    def weights(self, labels: Labels) -> None:  # noqa: ARG002
        """Not known beforehand."""
        return
