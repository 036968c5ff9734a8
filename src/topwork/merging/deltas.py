"""What an adapter changes: ΔW of each module, in the factors that it is made of wherever it has some.

    LoRA           ΔW = s B A         two factors, the scale in the first: rank r
    DoRA, IA3      ΔW = W' - W        dense; needs the base's W of that module
    embedding      ΔW = s (B A)'      [V, d], as the embedding holds its weight

ΔW lies as a linear layer's weight does, [out, in], an embedding's [V, d]. Norms and inner products of factors need
r×r matrices alone, since <B₁A₁, B₂A₂> = tr((B₁'B₂)(A₂A₁')).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRankDelta:
    """ΔW = b a. b [out, r], a [r, in], both fp64."""

    b: Tensor
    a: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """How many columns b has; ΔW's own rank may be lower."""
        return self.b.shape[1]

    def dense(self) -> Tensor:
        """ΔW [out, in] in fp64."""
        return self.b @ self.a

    def inner(self, other: "LowRankDelta") -> float:
        """The sum of the products of their values."""
        return float(((self.b.t() @ other.b) * (self.a @ other.a.t())).sum())

    def norm(self) -> float:
        """‖ΔW‖, the root of the sum of its squares."""
        return math.sqrt(max(self.inner(self), 0.0))


@dataclass(frozen=True)
class DenseDelta:
    """ΔW that is no product of small factors. values [out, in]; a vector's (a norm's, a bias') [1, n]."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.values.shape[0], self.values.shape[1]

    def dense(self) -> Tensor:
        """ΔW [out, in] in fp64."""
        return self.values.double()

    def norm(self) -> float:
        """‖ΔW‖, the root of the sum of its squares."""
        return float(torch.linalg.vector_norm(self.values, dtype=torch.float64))


Delta = LowRankDelta | DenseDelta


def inner(first: Delta, second: Delta) -> float:
    """<ΔW₁, ΔW₂>; by r×r matrices where both have factors."""
    if isinstance(first, LowRankDelta) and isinstance(second, LowRankDelta):
        return first.inner(second)
    return float((first.dense() * second.dense()).sum())


def weighted_sum(deltas: Sequence[Delta], coefficients: Sequence[float]) -> Delta:
    """Σ cᵢ ΔWᵢ: exact in factors of rank Σ rᵢ where all have some, else dense."""
    if all(isinstance(delta, LowRankDelta) for delta in deltas):
        b = torch.cat([c * delta.b for delta, c in zip(deltas, coefficients)], 1)  # type: ignore[union-attr]
        return LowRankDelta(b, torch.cat([delta.a for delta in deltas]))  # type: ignore[union-attr]
    return DenseDelta(sum(c * delta.dense() for delta, c in zip(deltas, coefficients)))  # type: ignore[arg-type]
