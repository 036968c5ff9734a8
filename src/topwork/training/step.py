"""One optimizer step, whole, of every adapter that takes part in its passes."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

from topwork.common.errors import NonFiniteLossError, RunError
from topwork.common.memory import memory_for
from topwork.models.base import Base
from topwork.objectives.columns import with_columns
from topwork.objectives.objective import Objective
from topwork.ops.batch import Batch
from topwork.ops.context import training_pass
from topwork.ops.host import read


@dataclass(frozen=True)
class Learner:
    """An adapter as the step knows it: what it learns, and what updates it."""

    name: str
    objective: Objective
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    max_grad_norm: float


@dataclass(frozen=True)
class Means:
    """A loss and an objective's other figures, each divided by the count."""

    loss: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class StepResult:
    """Mean loss per counted token, the gradient's norm before clipping, what went through, the objective's figures."""

    loss: float
    grad_norm: float
    tokens: int
    learned_tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass
class _Sum:
    """What one adapter's parts of the passes come to."""

    objective: Objective
    total: Tensor | float = 0.0
    count: float = 0.0
    metrics: dict[str, Tensor | float] = field(default_factory=lambda: defaultdict(float))
    tokens: int = 0
    learned: int = 0

    def add(self, logprobs: Tensor, part: Batch) -> Tensor:
        """Count a part in; its loss, to go backward from."""
        loss = self.objective(logprobs, part.labels)
        # in float64, and on the device: asking for the number here would wait for the pass
        self.total = self.total + loss.total.detach().double()
        self.count += loss.count
        for name, value in loss.metrics.items():
            self.metrics[name] = self.metrics[name] + (value.detach() if isinstance(value, Tensor) else value)
        self.tokens += len(part)
        self.learned += len(part.labels)
        return loss.total

    @property
    def sums(self) -> list[Tensor | float]:
        """The loss and the other figures, where they are."""
        return [self.total, *self.metrics.values()]

    def means(self, sums: Sequence[float]) -> Means:
        """Of all that was counted in, whose `sums` were read; what counts nothing is zero."""
        loss, *others = (value / (self.count or 1.0) for value in sums)
        return Means(loss, dict(zip(self.metrics, others, strict=True)))


def train_step(
    base: Base, learners: Sequence[Learner], passes: Sequence[Batch]
) -> list[StepResult | NonFiniteLossError]:
    """Sum each learner's loss over all passes, divide once by its own count, clip, update.

    Each segment of a pass is one learner's; ValueError for another's. One whose loss or gradient is not finite is not
    updated, so that its weights stay the last good ones: the error stands in place of its result, and the others go on.
    """
    sums = {learner.name: _Sum(learner.objective) for learner in learners}
    objectives = {learner.name: learner.objective for learner in learners}
    for given in passes:
        batch = with_columns(base, objectives, given)
        parts = [(_owner(sums, part), rows, part) for rows, part in batch.parts()]
        weights = [known.objective.weights(part.labels) for known, _, part in parts]
        with training_pass(base.workspace):
            logprobs = base.log_probabilities(batch, _gradient(weights))
            if logprobs.requires_grad:
                logprobs.register_hook(_finite)
            totals = [known.add(logprobs[rows], part) for known, rows, part in parts]
            torch.stack(totals).sum().backward()
    # once some weights are updated the step cannot be run again
    with memory_for(
        "updating the weights", "go on with --resume; training.optim: adamw_8bit holds less, or lower adapter.r"
    ):
        return _updated(learners, [sums[learner.name] for learner in learners])


def _updated(learners: Sequence[Learner], sums: Sequence[_Sum]) -> list[StepResult | NonFiniteLossError]:
    """The step of each adapter, from gradients that are sums.

    The one place where gradients meet their count: those of several devices would be added up here, before anything
    else is done with them. It is also the one where the host waits for a GPU.
    """
    gradients = [[x.grad for x in learner.parameters if x.grad is not None] for learner in learners]
    there = [[nn.utils.get_total_norm(own), *known.sums] for own, known in zip(gradients, sums)]
    numbers = iter(read([value for own in there for value in own]))
    results: list[StepResult | NonFiniteLossError] = []
    for learner, own, known in zip(learners, gradients, sums):
        norm, total, *figures = islice(numbers, 1 + len(known.sums))
        norm, most = norm / (known.count or 1.0), learner.max_grad_norm
        means, finite = known.means([total, *figures]), math.isfinite(total) and math.isfinite(norm)
        if finite and known.count:
            clipped = (norm + 1e-6) / most if most and norm > most else 1.0
            torch._foreach_div_(own, known.count * clipped)
            learner.optimizer.step()
        learner.optimizer.zero_grad()
        done = StepResult(means.loss, norm, known.tokens, known.learned, means.metrics)
        failed = NonFiniteLossError(f"the loss is {means.loss} and the gradient's norm {norm}")
        results.append(done if finite else failed)
    return results


@torch.no_grad()
def mean_losses(base: Base, objectives: Mapping[str, Objective], passes: Iterable[Batch]) -> dict[str, Means]:
    """Each adapter's mean of its objective over held-out passes, without a gradient. Raises RunError for an adapter
    whose rows count nothing."""
    sums = {name: _Sum(objective) for name, objective in objectives.items()}
    for given in passes:
        batch = with_columns(base, objectives, given)
        logprobs = base.log_probabilities(batch)
        for rows, part in batch.parts():
            _owner(sums, part).add(logprobs[rows], part)
    idle = [name for name, known in sums.items() if not known.count]
    if idle:
        raise RunError(
            f"nothing counts in the held-out rows of {', '.join(idle)}; give rows that its objective measures"
        )
    numbers = iter(read([value for known in sums.values() for value in known.sums]))
    return {name: known.means(list(islice(numbers, len(known.sums)))) for name, known in sums.items()}


def _owner(sums: Mapping[str, _Sum], part: Batch) -> _Sum:
    """The sums of the adapter whose segment a part is."""
    name = part.segments[0].adapter
    if name is None or name not in sums:
        raise ValueError(
            f"a segment of {name or 'the bare base'} is in a pass of {', '.join(sums)}; each segment is to be a "
            "learner's (what a reference says of them is a column, see objectives/columns.py)"
        )
    return sums[name]


def _gradient(weights: Sequence[Tensor | None]) -> Tensor | None:
    """d loss / d logprobs of the parts, row by row; None where one of them is not known beforehand."""
    known = [-weight for weight in weights if weight is not None]
    if len(known) < len(weights):
        return None
    return _finite(torch.cat(known) if len(known) > 1 else known[0])


def _finite(gradient: Tensor) -> Tensor:
    """Zero where it is not finite: the loss tells of it, and the other adapters' rows go backward untouched."""
    return torch.where(torch.isfinite(gradient), gradient, torch.zeros_like(gradient))
