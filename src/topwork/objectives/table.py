"""The objectives that a recipe can name."""

from collections.abc import Callable
from typing import Any

from topwork.objectives.config import SftConfig
from topwork.objectives.objective import Objective
from topwork.objectives.sft import Sft

OBJECTIVES: dict[type[Any], Callable[[Any], Objective]] = {SftConfig: lambda _: Sft()}
"""The class of the options -> the objective that they describe."""


def objective_of(config: SftConfig) -> Objective:
    """What a recipe's `training.objective` describes."""
    return OBJECTIVES[type(config)](config)
