"""KnOTS (Stoica et al., 2410.19735): TIES or DARE-TIES not on entries of ΔW but in directions that the sources share.

    [ΔW₁ … ΔWₙ] = U Σ [V₁ … Vₙ]        ΔW = U combined(ΣV₁, …, ΣVₙ)

The sources lie side by side, so U is common to all, and what is theirs alone is ΣVᵢ [k, in]. Directions without a
singular value are left out, as in the authors' code. With ΔWᵢ = bᵢ aᵢ nothing of ΔW's size is made: b = [b₁ … bₙ]
= Q R, and the blocks Rᵢ aᵢ, side by side, have the same Σ and V and, turned by Q, the same U. The result has rank Σ rᵢ
or less.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from topwork.merging.deltas import LowRankDelta

NOTHING = 1e-10
"""Of the largest singular value: a direction below it is rounding's own."""


@torch.no_grad()
def knots(deltas: Sequence[LowRankDelta], combined: Callable[[Tensor], Tensor]) -> LowRankDelta:
    """Combine ΔW in factors: `combined` takes the blocks [n, k, in] in fp64 and gives [k, in]: `entrywise.ties` or
    `entrywise.dare_ties` with its weights and densities."""
    u, blocks = aligned(deltas)
    return LowRankDelta(u, combined(blocks))


@torch.no_grad()
def aligned(deltas: Sequence[LowRankDelta]) -> tuple[Tensor, Tensor]:
    """U [out, k] of orthonormal columns, and every source's ΣV [n, k, in], with U ΣVᵢ = ΔWᵢ. k is 1 at least."""
    q, r = torch.linalg.qr(torch.cat([delta.b for delta in deltas], 1))
    parts = r.split([delta.rank for delta in deltas], 1)
    blocks = torch.stack([part @ delta.a for part, delta in zip(parts, deltas)])
    turned, sigma, _ = torch.linalg.svd(torch.cat(list(blocks), 1), full_matrices=False)
    turned = turned[:, : max(1, int((sigma > NOTHING * sigma[0]).sum()))]
    return q @ turned, turned.t() @ blocks
