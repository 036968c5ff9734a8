"""Ways to combine that look at each entry of ΔW by itself: TIES, DARE, DELLA, Breadcrumbs, pruning by magnitude.

Pure functions of one module's ΔW of every source, `deltas` [n, out, in] in fp32 or fp64 (zeros where a source leaves
the module alone), its `weights` and `density`, n numbers each. They give [out, in] of the same type and need about
twice the memory of `deltas`. A density is the share of entries that is kept, over 0 and at most 1; 1 keeps all. A
source of weight 0 counts for nothing, as if it had not been given (PEFT lets it vote). Sums run in the order of the
sources, so one result to the bit needs one order.

Libraries agree on the names and not on the formulas, so `convention` says whose is meant:

             sign of an entry         divided by                       what DARE drops is made up for by
    peft     of the plain sum         how many agree                   1 / density, as in the paper
    mergekit of the weighted sum      the sum of the agreeing weights  the same sum of magnitudes as before, Σ|ΔW|

Read in peft 0.21.2 (utils/merge_utils.py) and mergekit 0.1.5 (sparsify.py and, of merge_methods,
generalized_task_arithmetic.py). Three departures. A trim keeps at least one entry, where PEFT's can keep none. The
agreeing weights are summed as magnitudes: mergekit's own sum of a weight and a negative one may be anything near 0, to
divide by, and of a negative one alone it turns the sign back. A tie of magnitudes goes to the entry that stands first.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from topwork.common.errors import RequestError
from topwork.merging.combine.settings import TiesWeights

EPSILON = 0.15
GAMMA = 0.01


def ties(deltas: Tensor, weights: Sequence[float], density: Sequence[float], convention: TiesWeights) -> Tensor:
    """TIES (Yadav et al., 2306.01708): trim each ΔW to its largest entries, elect a sign for each entry, average those
    that agree with it. A sum of 0 elects plus."""
    trimmed = [trim(delta, share) for delta, share in _paired(deltas, density)]
    return _agreeing(trimmed, weights, convention, average=True)


def magnitude_prune(deltas: Tensor, weights: Sequence[float], density: Sequence[float]) -> Tensor:
    """The weighted sum of trimmed ΔW. PEFT's; mergekit's `breadcrumbs` with a gamma of 0."""
    return _summed((trim(delta, share) for delta, share in _paired(deltas, density)), weights, deltas)


def dare(
    deltas: Tensor, weights: Sequence[float], density: Sequence[float], masks: Tensor, convention: TiesWeights
) -> Tensor:
    """DARE (Yu et al., 2311.03099): entries drop at random, the others are enlarged, and all are added by weight.

    masks [n, out, in], True for what is kept (`masks.at_random`). PEFT's `dare_linear`, mergekit's `dare_linear`.
    """
    kept = (enlarged(*given, convention) for given in zip(deltas, masks, _checked(density, deltas)))
    return _summed(kept, weights, deltas)


def dare_ties(
    deltas: Tensor, weights: Sequence[float], density: Sequence[float], masks: Tensor, convention: TiesWeights
) -> Tensor:
    """DARE's drop and enlarging in place of the trim, then TIES' elected signs. Entries that agree are averaged in
    PEFT's convention and added in mergekit's, as each does unless it is told otherwise."""
    kept = [enlarged(*given, convention) for given in zip(deltas, masks, _checked(density, deltas))]
    return _agreeing(kept, weights, convention, average=convention == "peft")


def della(
    deltas: Tensor, weights: Sequence[float], density: Sequence[float], masks: Tensor, convention: TiesWeights,
    epsilon: float = EPSILON,
) -> Tensor:  # fmt: skip
    """DELLA (Deep et al., 2406.11617): as `ties`, but entries drop at random, and the larger an entry is among those of
    its row, the likelier it stays (`chances`).

    masks [n, out, in], True for what is kept (`masks.by_rank`). What drops is made up for by one over each entry's own
    chance in the paper, taken under `peft` (PEFT has no DELLA), and by Σ|ΔW| in mergekit.
    """
    kept = []
    for delta, mask, share in zip(deltas, masks, _checked(density, deltas)):
        chance: float | Tensor = share
        if convention == "peft":
            chance = chances(delta, share, epsilon)
        kept.append(enlarged(delta, mask, chance, convention))
    return _agreeing(kept, weights, convention, average=True)


def breadcrumbs(deltas: Tensor, weights: Sequence[float], density: Sequence[float], gamma: float = GAMMA) -> Tensor:
    """Model Breadcrumbs (Davari and Belilovsky, 2312.06795): of each ΔW the share `gamma` of largest entries is
    dropped, then the smallest until the share `density` is left; the weighted sum of that, not enlarged.

    Where density + gamma is over 1, fewer of the largest are dropped, so that the density holds (as in mergekit).
    """
    check_gamma(gamma)

    def middle(delta: Tensor, share: float) -> Tensor:
        count, kept = delta.numel(), _count(delta, share)
        dropped = min(int(gamma * count), count - kept)
        mask = largest(delta, dropped + kept) & ~largest(delta, dropped)
        return torch.where(mask, delta, 0)

    return _summed((middle(delta, share) for delta, share in _paired(deltas, density)), weights, deltas)


def trim(delta: Tensor, density: float) -> Tensor:
    """The int(density · entries) largest by magnitude, one at least; the others 0."""
    return delta if density == 1 else torch.where(largest(delta, _count(delta, density)), delta, 0)


def largest(delta: Tensor, count: int) -> Tensor:
    """True for the `count` entries of the greatest magnitude; of equal ones the first."""
    sizes = delta.abs().flatten()
    if count <= 0 or count >= sizes.numel():
        return torch.full(delta.shape, count > 0, device=delta.device)
    place = sizes.numel() - count
    least = float(np.partition(sizes.cpu().numpy(), place)[place])
    mask = sizes > least
    equal = (sizes == least).nonzero().flatten()
    mask[equal[: count - int(mask.sum())]] = True
    return mask.view(delta.shape)


def chances(delta: Tensor, density: float, epsilon: float = EPSILON) -> Tensor:
    """DELLA's chance for each entry to be kept [out, in]: evenly from density - ε for the smallest of its row to
    density + ε for the largest; equal ones rise in their order. All 1 at a density of 1."""
    check_epsilon(epsilon, density)
    if density == 1 or delta.shape[1] == 1:
        return torch.full_like(delta, density)
    order = delta.abs().argsort(dim=1, stable=True)
    places = torch.arange(delta.shape[1], dtype=delta.dtype, device=delta.device).expand_as(delta)
    ranks = torch.empty_like(delta).scatter_(1, order, places)
    return density - epsilon + 2 * epsilon * ranks / (delta.shape[1] - 1)


def enlarged(delta: Tensor, mask: Tensor, chance: float | Tensor, convention: TiesWeights) -> Tensor:
    """What the mask keeps, times what makes up for the rest: 1 / chance, or Σ|ΔW| before over after."""
    kept = torch.where(mask, delta, 0)
    if convention == "peft":
        return kept / chance
    before, after = (side.abs().sum(dtype=torch.float64) for side in (delta, kept))
    return kept * float(before / after) if after > 0 else kept


def check_density(density: Sequence[float], sources: int) -> None:
    """Raises RequestError for what is not one share for each source, over 0 and at most 1."""
    if len(density) != sources:
        raise RequestError(f"{len(density)} densities for {sources} adapters; give one, or one for each")
    for share in density:
        if not 0 < share <= 1:
            raise RequestError(f"density {share} is no share of entries to keep; give one over 0 and at most 1")


def check_epsilon(epsilon: float, density: float) -> None:
    """Raises RequestError where DELLA's chances would leave 0 .. 1."""
    if density < 1 and not (0 <= epsilon < density and density + epsilon <= 1):
        raise RequestError(
            f"epsilon {epsilon} beside density {density}: chances {density - epsilon:.3g} to {density + epsilon:.3g}, "
            f"where over 0 and up to 1 makes sense; give an epsilon from 0 to below {min(density, 1 - density):.3g}"
        )


def check_gamma(gamma: float) -> None:
    """Raises RequestError for a gamma that is no share."""
    if not 0 <= gamma < 1:
        raise RequestError(f"gamma {gamma} is no share of the largest entries to drop; give one from 0 to below 1")


def _checked(density: Sequence[float], deltas: Tensor) -> Sequence[float]:
    check_density(density, len(deltas))
    return density


def _paired(deltas: Tensor, density: Sequence[float]) -> list[tuple[Tensor, float]]:
    return list(zip(deltas, _checked(density, deltas)))


def _count(delta: Tensor, density: float) -> int:
    return max(1, int(density * delta.numel()))


def _summed(parts: Iterable[Tensor], weights: Sequence[float], like: Tensor) -> Tensor:
    total = torch.zeros_like(like[0])
    for part, weight in zip(parts, weights):
        if weight:
            total.add_(part, alpha=weight)
    return total


def _agreeing(parts: Sequence[Tensor], weights: Sequence[float], convention: TiesWeights, average: bool) -> Tensor:
    """The sum or the average of the weighted entries that have the sign elected for their place."""
    weighted = convention == "mergekit"
    counted = [(part, weight) for part, weight in zip(parts, weights) if weight]
    plus = _summed(parts, weights if weighted else [float(weight != 0) for weight in weights], parts[0][None]) >= 0
    total, shares = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
    for part, weight in counted:
        turned = weighted and weight < 0
        agrees = torch.where(plus != turned, part > 0, part < 0)
        total.add_(torch.where(agrees, part, 0), alpha=weight)
        shares.add_(agrees, alpha=abs(weight) if weighted else 1)
    return total.div_(shares.masked_fill_(shares == 0, 1)) if average else total
