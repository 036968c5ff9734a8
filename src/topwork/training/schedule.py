"""The learning rate at each step."""

import math

from topwork.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (0-based) of `steps`: a line up from zero, then the schedule down to zero.

    As in transformers: during a warm-up of w steps the rate is peak * step / w.
    """
    warmup = warmup_steps(config, steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * (1 - done)
    return config.learning_rate


def warmup_steps(config: TrainingConfig, steps: int) -> int:
    """The number of warm-up steps of a run."""
    return config.warmup_steps if config.warmup_steps is not None else math.ceil(config.warmup_ratio * steps)
