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
    """ΔW that is no product of small factors. values [out, in], fp32 or fp64; a vector's (a norm's, a bias') [1, n]."""

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
    factors = [(delta, c) for delta, c in zip(deltas, coefficients) if isinstance(delta, LowRankDelta)]
    if len(factors) == len(deltas):
        factors = [pair for pair in factors if pair[1]] or [(factors[0][0], 0.0)]
        return LowRankDelta(torch.cat([c * delta.b for delta, c in factors], 1), torch.cat([d.a for d, _ in factors]))
    total = torch.zeros(deltas[0].shape, dtype=torch.float64)
    for delta, c in zip(deltas, coefficients):
        total += c * delta.dense()
    return DenseDelta(total)


def as_matrix(values: Tensor) -> Tensor:
    """A parameter of any shape as rows and columns; a vector is one row."""
    return values[None] if values.dim() == 1 else values.flatten(1)


def as_factors(delta: Delta) -> LowRankDelta:
    """A dense one with its shorter side's identity as the other factor."""
    if isinstance(delta, LowRankDelta):
        return delta
    rows, columns = delta.shape
    values, identity = delta.dense(), torch.eye(min(rows, columns), dtype=torch.float64)
    return LowRankDelta(identity, values) if rows <= columns else LowRankDelta(values, identity)


def singular_values(delta: LowRankDelta) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], S [k], V' [k, in] of ΔW, k the least of rank, out and in, without a dense matrix: QR of both factors
    and the SVD of the small product of what is left of them."""
    q_b, r_b = torch.linalg.qr(delta.b)
    q_a, r_a = torch.linalg.qr(delta.a.t())
    u, s, v = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    return q_b @ u, s, v @ q_a.t()


def reduced(delta: LowRankDelta, rank: int) -> tuple[LowRankDelta, float]:
    """The best approximation of ΔW of this rank, both factors equally large, and the energy that it leaves out: the
    sum of the squares of the singular values behind it, which is ‖ΔW - it‖²."""
    if rank >= delta.rank:
        return delta, 0.0
    u, s, v = singular_values(delta)
    root = s[:rank].sqrt()
    return LowRankDelta(u[:, :rank] * root, root[:, None] * v[:rank]), float(s[rank:].square().sum())
