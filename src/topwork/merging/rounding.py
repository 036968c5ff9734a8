"""How much of an adapter is lost where a merged weight is stored in 16 bits.

    share = |stored - exact| / |exact - W|        Frobenius norms; 0 where nothing is lost, near 1 where all of it is

A weight in bf16 has 8 bits of precision: what an adapter adds below 1/512 of a value is rounded away, or doubled.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.ops.rows import rows_at_once


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
        lost = changed = 0.0
        tables = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (exact, stored, before)]
        for rows, kept, own in zip(*(table.split(rows_at_once(tables[0])) for table in tables)):
            lost += float((kept.to(rows.dtype) - rows).square().sum(dtype=torch.float64))
            changed += float((rows - own.to(rows.dtype)).square().sum(dtype=torch.float64))
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
