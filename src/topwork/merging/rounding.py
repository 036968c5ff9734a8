"""How much of an adapter is lost where a merged weight is stored in 16 bits.

    share = |stored - exact| / |exact - W|        Frobenius norms; 0 where nothing is lost, near 1 where all of it is

A weight in bf16 has 8 bits of precision: what an adapter adds below 1/512 of a value is rounded away, or doubled.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoundingLoss:
    """The share that rounding took of what the adapter adds, over all changed weights, and where it took most."""

    share: float
    worst_share: float
    worst: str


class Rounding:
    """Told of each merged weight when it is stored."""

    def __init__(self) -> None:
        self._squares: dict[str, tuple[float, float]] = {}

    @torch.no_grad()
    def add(self, name: str, exact: Tensor, stored: Tensor, before: Tensor) -> None:
        """A weight before, the exact sum in fp32, and that as it is stored; of one shape. What is stored in 32 bits is
        left out."""
        if stored.dtype.itemsize > 2:
            return
        lost = float(torch.linalg.vector_norm(stored.to(exact.dtype).sub_(exact))) ** 2
        changed = float(torch.linalg.vector_norm(exact - before.to(exact.dtype))) ** 2
        self._squares[name] = (lost, changed)

    def loss(self) -> RoundingLoss | None:
        """None where nothing was stored in 16 bits, or nothing was changed."""
        changed = {name: pair for name, pair in self._squares.items() if pair[1] > 0}
        if not changed:
            return None
        lost, added = (sum(pair[at] for pair in changed.values()) for at in (0, 1))
        shares = {name: math.sqrt(pair[0] / pair[1]) for name, pair in changed.items()}
        worst = max(shares, key=lambda name: shares[name])
        return RoundingLoss(math.sqrt(lost / added), shares[worst], worst)
