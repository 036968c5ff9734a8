"""One optimizer step, whole, of every adapter that takes part in its passes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from topwork.common.errors import NonFiniteLossError
from topwork.models.base import Base
from topwork.ops.stream import Segment, Stream
from topwork.training.objective import Objective


@dataclass(frozen=True)
class Learner:
    """An adapter as the step knows it: what it learns, and what updates it."""

    name: str
    objective: Objective
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    max_grad_norm: float


@dataclass(frozen=True)
class StepResult:
    """Mean loss per counted token, the gradient's norm before clipping, and what went through."""

    loss: float
    grad_norm: float
    tokens: int
    learned_tokens: int


@dataclass
class _Sum:
    """What one adapter's parts of the passes come to."""

    objective: Objective
    total: Tensor | float = 0.0
    count: float = 0.0
    tokens: int = 0
    learned: int = 0


def train_step(
    base: Base, learners: Sequence[Learner], passes: Sequence[Stream]
) -> list[StepResult | NonFiniteLossError]:
    """Sum each learner's loss over all passes, divide once by its own count, clip, update.

    Each segment of a pass is one learner's. One whose loss or gradient is not finite is not updated, so that its
    weights stay the last good ones: the error stands in place of its result, and the others go on.
    """
    sums = {learner.name: _Sum(learner.objective) for learner in learners}
    for stream in passes:
        parts = [(sums[str(part.segments[0].adapter)], rows, part) for rows, part in parts_of(stream)]
        announced = [known.objective.gradient(part) for known, _, part in parts]
        with base.memory.next_pass():
            logprobs = base.log_probabilities(stream, _joined(announced))
            if logprobs.requires_grad:
                logprobs.register_hook(_finite)
            totals = [_added(known, logprobs[rows], part) for known, rows, part in parts]
            torch.stack(totals).sum().backward()
    return [_updated(learner, sums[learner.name]) for learner in learners]


def _updated(learner: Learner, known: _Sum) -> StepResult | NonFiniteLossError:
    """The step of one adapter, from gradients that are sums."""
    gradients = [parameter.grad for parameter in learner.parameters if parameter.grad is not None]
    torch._foreach_div_(gradients, known.count)
    total, norm = float(known.total), float(nn.utils.get_total_norm(gradients))
    finite = math.isfinite(total) and math.isfinite(norm)
    if finite:
        if learner.max_grad_norm and norm > learner.max_grad_norm:
            torch._foreach_mul_(gradients, learner.max_grad_norm / (norm + 1e-6))
        learner.optimizer.step()
    learner.optimizer.zero_grad()
    if not finite:
        return NonFiniteLossError(f"the loss is {total / known.count} and the gradient's norm {norm}")
    return StepResult(total / known.count, norm, known.tokens, known.learned)


@torch.no_grad()
def mean_losses(base: Base, objectives: Mapping[str, Objective], passes: Sequence[Stream]) -> dict[str, float]:
    """Each adapter's mean of its objective over held-out passes, without a gradient."""
    sums = {name: _Sum(objective) for name, objective in objectives.items()}
    for stream in passes:
        logprobs = base.log_probabilities(stream)
        for rows, part in parts_of(stream):
            _added(sums[str(part.segments[0].adapter)], logprobs[rows], part)
    return {name: float(known.total) / known.count for name, known in sums.items()}


def parts_of(stream: Stream) -> list[tuple[slice, Stream]]:
    """Each segment as a stream of its own, and which of the whole's learned rows are its."""
    if len(stream.segments) == 1:
        return [(slice(None), stream)]
    own = stream.by_segment(stream.rows)
    return [(rows, _part(stream, segment, rows)) for segment, rows in zip(stream.segments, own)]


def _part(stream: Stream, segment: Segment, rows: slice) -> Stream:
    at = slice(segment.start, segment.stop)
    length = segment.stop - segment.start
    return replace(
        stream,
        tokens=stream.tokens[at],
        positions=stream.positions[at],
        bounds=tuple(b - segment.start for b in stream.bounds if segment.start <= b <= segment.stop),
        segments=(Segment(0, length, segment.adapter),),
        rows=stream.rows[rows] - segment.start,
        targets=stream.targets[rows],
        weights=stream.weights[rows],
        draws=None,
    )


def _added(known: _Sum, logprobs: Tensor, part: Stream) -> Tensor:
    """Count a part in; its loss, to go backward from."""
    loss = known.objective(logprobs, part)
    # in float64, and on the device: asking for the number here would wait for the pass
    known.total = known.total + loss.total.detach().double()
    known.count += loss.count
    known.tokens += len(part.tokens)
    known.learned += len(part.rows)
    return loss.total


def _joined(announced: Sequence[Tensor | None]) -> Tensor | None:
    """The parts' gradients row by row; None where one of them is not known beforehand."""
    known = [gradient for gradient in announced if gradient is not None]
    if len(known) < len(announced):
        return None
    return _finite(torch.cat(known) if len(known) > 1 else known[0])


def _finite(gradient: Tensor) -> Tensor:
    """Zero where it is not finite: the loss tells of it, and the other adapters' rows go backward untouched."""
    return torch.where(torch.isfinite(gradient), gradient, torch.zeros_like(gradient))
