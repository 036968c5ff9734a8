"""The advised learning rate beside the best that recorded sweeps found, for the same steps: within a factor of two."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from advice_cases import SMALL

from topwork.plan.advice.advise import advise
from topwork.plan.advice.facts import Facts

ROOT = Path(__file__).parents[3] / "benchmarks"
TASKS = {"banking77": "classification", "gsm8k": "reasoning", "e2e_nlg": "summarization"}
FACTOR = 2


def record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "results" / f"sweep_{name}_learning-rate.json").read_text("utf-8"))
    return found


def losses(name: str) -> dict[float, float]:
    """Learning rate -> mean loss on held-out rows, of those where no seed diverged."""
    points = record(name)["sweep"]["points"]
    return {point["values"]["learning rate"]: point["loss"]["mean"] for point in points if not point["diverged"]}


def advised(name: str) -> float:
    """For the sweep's rows, steps and base, by nothing that names the data."""
    found = record(name)
    training = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text("utf-8"))["training"]
    decided = {"training.batch_size": training["batch_size"], "training.num_train_epochs": 1}
    assert found["sweep"]["model"] == "smollm2-135m"
    advice = advise(Facts(TASKS[name], found["rows"], structure=SMALL, held_out=True, decided=decided))
    assert advice.steps == found["sweep"]["members"][0]["result"]["planned_steps"]
    return float(advice.value("training.learning_rate"))


def between(found: dict[float, float]) -> float:
    """The lowest point of a parabola through the best rate and its neighbours, which lie evenly in the logarithm."""
    rates = sorted(found)
    at = min(range(1, len(rates) - 1), key=lambda each: found[rates[each]])
    low, mid, high = (found[rates[each]] for each in (at - 1, at, at + 1))
    step = math.log(rates[at + 1] / rates[at])
    return rates[at] * math.exp(step * (low - high) / (2 * (low - 2 * mid + high)))


@pytest.mark.parametrize("name", TASKS)
def test_the_advised_rate_is_within_two_of_the_best_that_was_swept(name: str) -> None:
    found = losses(name)
    best = min(found, key=lambda rate: found[rate])
    assert min(found) < best < max(found), "the grid does not reach beyond the best"
    assert max(advised(name) / best, best / advised(name)) <= FACTOR


@pytest.mark.parametrize("name", TASKS)
def test_it_is_within_two_of_the_best_between_the_swept_ones_too(name: str) -> None:
    """The grid is of half decades; between its points the best is where a parabola has its lowest."""
    best = between(losses(name))
    assert max(advised(name) / best, best / advised(name)) <= FACTOR
