"""What a combination is asked for. Free of torch."""

from dataclasses import dataclass
from typing import Literal

TiesWeights = Literal["peft", "mergekit"]
TIES_WEIGHTS: tuple[TiesWeights, ...] = ("mergekit", "peft")


@dataclass(frozen=True)
class Settings:
    """The options of all methods; `table.py` says which reads which.

    weights       one for each source, of any sign
    density       one for each source: the share of its values that are kept, over 0 and at most 1
    ties_weights  whose meaning weights and rescaling have where libraries differ (`entrywise.py`)
    scale         λ, which the combined change is multiplied by
    epsilon       DELLA: how far the least and the greatest chance to be kept lie from the density
    gamma         Breadcrumbs: the share of the largest values that is dropped
    seed          of what drops at random
    rank          of the result; None for what the method gives
    """

    method: str
    weights: tuple[float, ...]
    density: tuple[float, ...]
    ties_weights: TiesWeights = "mergekit"
    scale: float = 1.0
    epsilon: float = 0.15
    gamma: float = 0.01
    seed: int = 0
    rank: int | None = None
