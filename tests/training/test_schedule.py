"""The learning rate at each step against transformers' schedulers."""

import math
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from topwork.training.config import TrainingConfig
from topwork.training.schedule import learning_rate, warmup_steps


@pytest.mark.parametrize("steps", [1, 2, 10, 37])
@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_rates_of_transformers(kind: str, warmup: int, steps: int) -> None:
    config = TrainingConfig(learning_rate=3e-4, lr_scheduler_type=kind, warmup_steps=warmup)
    theirs = "constant_with_warmup" if kind == "constant" else kind
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        assert learning_rate(config, step, steps) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-15), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("values", "steps", "expected"),
    [
        ({"warmup_ratio": 0.1}, 100, 10),
        ({"warmup_ratio": 0.03}, 10, 1),
        ({"warmup_ratio": 0.0}, 10, 0),
        ({"warmup_ratio": 0.5, "warmup_steps": 3}, 100, 3),
        ({"warmup_ratio": 0.5, "warmup_steps": 0}, 100, 0),
    ],
)
def test_warm_up_by_share_or_by_steps(values: dict[str, Any], steps: int, expected: int) -> None:
    assert warmup_steps(TrainingConfig(**values), steps) == expected


def test_milestones() -> None:
    cosine = TrainingConfig(learning_rate=1.0, warmup_steps=4, lr_scheduler_type="cosine")
    assert [learning_rate(cosine, step, 12) for step in (0, 1, 4, 8)] == pytest.approx([0, 0.25, 1, 0.5])
    assert learning_rate(cosine, 11, 12) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    linear = cosine.model_copy(update={"lr_scheduler_type": "linear"})
    assert [learning_rate(linear, step, 12) for step in (4, 6, 11)] == pytest.approx([1, 0.75, 0.125])
