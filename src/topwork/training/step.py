"""One optimizer step, whole."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from topwork.common.errors import NonFiniteLossError
from topwork.models.base import Base
from topwork.ops.stream import Stream
from topwork.training.objective import Objective


@dataclass(frozen=True)
class StepResult:
    """Mean loss per counted token, the gradient's norm before clipping, and what went through."""

    loss: float
    grad_norm: float
    tokens: int
    learned_tokens: int


def train_step(
    base: Base,
    objective: Objective,
    passes: Sequence[Stream],
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
) -> StepResult:
    """Sum the loss over all passes, divide once by the step's count, clip, update.

    Raises NonFiniteLossError before anything is updated, so that the weights stay the last good ones.
    """
    total, count = 0.0, 0.0
    for stream in passes:
        logprobs = base.log_probabilities(stream, objective.gradient(stream))
        loss = objective(logprobs, stream)
        loss.total.backward()
        total, count = total + float(loss.total.detach()), count + loss.count

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_div_(gradients, count)
    norm = float(nn.utils.get_total_norm(gradients))
    if not (math.isfinite(total) and math.isfinite(norm)):
        optimizer.zero_grad()
        raise NonFiniteLossError(f"the loss is {total / count} and the gradient's norm {norm}")
    if max_grad_norm and norm > max_grad_norm:
        torch._foreach_mul_(gradients, max_grad_norm / (norm + 1e-6))
    optimizer.step()
    optimizer.zero_grad()

    tokens, learned = (sum(len(part) for part in parts) for parts in zip(*((s.tokens, s.rows) for s in passes)))
    return StepResult(total / count, norm, tokens, learned)


@torch.no_grad()
def mean_loss(base: Base, objective: Objective, passes: Sequence[Stream]) -> float:
    """The objective's mean over held-out passes, without a gradient."""
    total, count = 0.0, 0.0
    for stream in passes:
        loss = objective(base.log_probabilities(stream), stream)
        total, count = total + float(loss.total), count + loss.count
    return total / count
