"""The learning rate at each step: the warm-up against its definition, what follows it against transformers."""

import math
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from topwork.training.config import TrainingConfig
from topwork.training.schedule import learning_rate, warmup_note, warmup_steps


@pytest.mark.parametrize("steps", [1, 2, 10, 37])
@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_after_the_warm_up_the_rates_of_transformers(kind: str, warmup: int, steps: int) -> None:
    config = TrainingConfig(learning_rate=3e-4, lr_scheduler_type=kind, warmup_steps=warmup)
    theirs = "constant_with_warmup" if kind == "constant" else kind
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        rate = learning_rate(config, step, steps)
        if step >= warmup:
            assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-15), step
        else:
            assert rate > optimizer.param_groups[0]["lr"], step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("warmup", [1, 2, 5, 30])
def test_a_warm_up_is_a_line_whose_first_step_trains_and_whose_next_is_the_peak(warmup: int) -> None:
    config = TrainingConfig(learning_rate=3e-4, warmup_steps=warmup)
    even = torch.linspace(0, 3e-4, warmup + 2, dtype=torch.float64).tolist()[1:]  # zero itself is left out
    assert [learning_rate(config, step, 40) for step in range(warmup + 1)] == pytest.approx(even, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "steps", "expected"),
    [
        ({"warmup_ratio": 0.1}, 100, 10),
        ({"warmup_ratio": 0.03}, 1, 0),
        ({"warmup_ratio": 0.03}, 10, 0),
        ({"warmup_ratio": 0.03}, 16, 0),
        ({"warmup_ratio": 0.03}, 17, 1),
        ({"warmup_ratio": 0.05}, 10, 1),  # a half, up
        ({"warmup_ratio": 0.29}, 50, 15),  # so is this, though 0.29 * 50 is a little less than 14.5
        ({"warmup_ratio": 0.0}, 10, 0),
        ({"warmup_ratio": 0.99}, 1, 0),
        ({"warmup_ratio": 0.99}, 10, 9),
        ({"warmup_ratio": 1e-9}, 10, 0),
        ({"warmup_ratio": 0.5, "warmup_steps": 3}, 100, 3),
        ({"warmup_ratio": 0.5, "warmup_steps": 0}, 100, 0),
    ],
)
def test_warm_up_by_share_or_by_steps(values: dict[str, Any], steps: int, expected: int) -> None:
    assert warmup_steps(TrainingConfig(**values), steps) == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 0.999])
def test_a_share_reaches_the_peak_and_trains_in_every_step(ratio: float, steps: int) -> None:
    config = TrainingConfig(learning_rate=1.0, warmup_ratio=ratio)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert max(rates) == 1.0
    assert min(rates) > 0


def test_milestones() -> None:
    cosine = TrainingConfig(learning_rate=1.0, warmup_steps=4, lr_scheduler_type="cosine")
    assert [learning_rate(cosine, step, 12) for step in (0, 1, 4, 8)] == pytest.approx([0.2, 0.4, 1, 0.5])
    assert learning_rate(cosine, 11, 12) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    linear = cosine.model_copy(update={"lr_scheduler_type": "linear"})
    assert [learning_rate(linear, step, 12) for step in (4, 6, 11)] == pytest.approx([1, 0.75, 0.125])


@pytest.mark.parametrize(
    ("warmup", "steps", "told"),
    [
        (100, 6, "warmup_steps is 100 and the run has 6 steps: the learning rate reaches 6 % of its peak"),
        (6, 6, "warmup_steps is 6 and the run has 6 steps: the learning rate reaches 86 % of its peak"),
        (5000, 1, "warmup_steps is 5,000 and the run has 1 step: the learning rate reaches 0.02 % of its peak"),
        (5, 6, None),
        (0, 1, None),
    ],
)
def test_a_warm_up_as_long_as_the_run_is_told(warmup: int, steps: int, told: str | None) -> None:
    config = TrainingConfig(learning_rate=1.0, warmup_steps=warmup)
    note = warmup_note(config, steps)
    assert (note is None) if told is None else str(note).startswith(told)
    if note is not None:
        assert max(learning_rate(config, step, steps) for step in range(steps)) == steps / (warmup + 1)
