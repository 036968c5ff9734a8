"""How many steps a run has, and the learning rate at each."""

import math
from fractions import Fraction

from topwork.common.errors import RecipeError
from topwork.training.config import TrainingConfig


def planned_steps(config: TrainingConfig, steps_per_epoch: int | None) -> int:
    """Optimizer steps of a run. Raises RecipeError where its rows have no epochs and the recipe names no steps."""
    if config.max_steps is not None:
        return config.max_steps
    if steps_per_epoch is None:
        raise RecipeError("these rows have no end that an epoch could be counted by; set training.max_steps")
    return max(1, round(config.num_train_epochs * steps_per_epoch))


VALIDATIONS = 10
"""Of a run that names no eval_steps, after the one before its first step."""


def validated_every(eval_steps: int | None, steps: int) -> int:
    """After how many steps a run of `steps` steps is validated each time."""
    return eval_steps or max(1, math.ceil(steps / VALIDATIONS))


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (0-based) of `steps`: a line up to the peak, then the schedule down to zero.

    During a warm-up of w steps the rate is peak * (step + 1) / (w + 1), so that the first step trains; at step w it is
    the peak, and from there on the rate is that of transformers, whose warm-up is peak * step / w.
    """
    warmup = warmup_steps(config, steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * (1 - done)
    return config.learning_rate


def warmup_steps(config: TrainingConfig, steps: int) -> int:
    """The number of warm-up steps of a run: as given, else the share of its steps rounded to the nearest number (a half
    up), but never all of them."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    share = Fraction(str(config.warmup_ratio)) * steps  # as it was typed: 0.29 of 50 is 14.5, and not a little less
    return min(math.floor(share + Fraction(1, 2)), steps - 1)


def warmup_note(config: TrainingConfig, steps: int) -> str | None:
    """What is to be told of a warm-up that is as long as the run, or longer; None for others."""
    warmup = warmup_steps(config, steps)
    if warmup < steps:
        return None
    run, reached = f"{steps:,} step{'s' if steps > 1 else ''}", _percent(steps / (warmup + 1))
    return (
        f"warmup_steps is {warmup:,} and the run has {run}: the learning rate reaches {reached} of its peak; lower "
        "training.warmup_steps, or leave it out for a share of the steps"
    )


def _percent(share: float) -> str:
    """In whole per cent where that says enough."""
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"
