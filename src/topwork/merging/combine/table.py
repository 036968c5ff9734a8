"""The ways to combine adapters, a record each. A new one is a function in a file of its own and a line here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Generator, Tensor

from topwork.common.errors import RequestError, did_you_mean
from topwork.merging.combine import entrywise, masks
from topwork.merging.combine.knots import knots
from topwork.merging.combine.linear import as_mean, as_weighted, check_arc, check_mean, on_the_arc
from topwork.merging.combine.settings import Settings
from topwork.merging.deltas import Delta, LowRankDelta

Coefficients = Callable[[Sequence[Delta], Sequence[float]], list[float]]
"""One module's ΔW of every source, and the sources' weights -> the cᵢ of Σ cᵢ ΔWᵢ."""
Entrywise = Callable[[Tensor, Settings, Sequence[Generator]], Tensor]
"""(one module's ΔW of every source [n, out, in] in fp32, zeros where a source leaves it alone; the settings; each
source's generator, of what drops there) -> [out, in], before λ."""
Factors = Callable[[Sequence[LowRankDelta], Settings], LowRankDelta]
"""One module's ΔW of every source, in factors -> what they combine to, before λ."""


@dataclass(frozen=True)
class Way:
    """One method.

    coefficients   of a linear one, which needs no dense matrix where its sources have factors; or
    entrywise      what gives the dense result, which is then truncated; or
    factors        what goes over factors itself, and gives some
    check          of the weights; raises RequestError for some that it cannot take
    reads          the options beside weights and rank that it knows
    density        the one that it takes where none is given
    sources        how many it needs; None for one or more
    meets          whether it says nothing where no two sources change the same module
    largest_rank   without a rank: the sources' largest, where others take their sum
    reference      whose it is
    """

    name: str
    says: str
    reference: str
    coefficients: Coefficients | None = None
    entrywise: Entrywise | None = None
    factors: Factors | None = None
    check: Callable[[Sequence[float]], None] | None = None
    reads: tuple[str, ...] = ()
    density: float = 1.0
    sources: int | None = None
    meets: bool = False
    largest_rank: bool = False


def _ties(deltas: Tensor, s: Settings, _: Sequence[Generator]) -> Tensor:
    return entrywise.ties(deltas, s.weights, s.density, s.ties_weights)


def _dare(deltas: Tensor, s: Settings, by: Sequence[Generator]) -> Tensor:
    drawn = masks.at_random(deltas, s.density, by)
    return entrywise.dare(deltas, s.weights, s.density, drawn, s.ties_weights)


def _dare_ties(deltas: Tensor, s: Settings, by: Sequence[Generator]) -> Tensor:
    drawn = masks.at_random(deltas, s.density, by)
    return entrywise.dare_ties(deltas, s.weights, s.density, drawn, s.ties_weights)


def _magnitude_prune(deltas: Tensor, s: Settings, _: Sequence[Generator]) -> Tensor:
    return entrywise.magnitude_prune(deltas, s.weights, s.density)


def _della(deltas: Tensor, s: Settings, by: Sequence[Generator]) -> Tensor:
    drawn = masks.by_rank(deltas, s.density, by, s.epsilon)
    return entrywise.della(deltas, s.weights, s.density, drawn, s.ties_weights, s.epsilon)


def _breadcrumbs(deltas: Tensor, s: Settings, _: Sequence[Generator]) -> Tensor:
    return entrywise.breadcrumbs(deltas, s.weights, s.density, s.gamma)


def _knots(deltas: Sequence[LowRankDelta], s: Settings) -> LowRankDelta:
    return knots(deltas, lambda blocks: entrywise.ties(blocks, s.weights, s.density, s.ties_weights))


WAYS: dict[str, Way] = {
    way.name: way
    for way in (
        Way("cat", "Σ w ΔW, in factors of rank Σ r", "peft's cat", as_weighted),
        Way("linear", "Σ w ΔW / Σ w, in factors of rank Σ r", "mergekit's linear", as_mean, check=check_mean),
        Way("task-arithmetic", "λ Σ w ΔW, in factors of rank Σ r", "arXiv 2212.04089", as_weighted, reads=("scale",)),
        Way("svd", "the best approximation of Σ w ΔW in the sources' largest rank", "peft's svd", as_weighted,
            largest_rank=True),
        Way("slerp", "on the arc from ΔW₁ to ΔW₂, in factors of rank r₁ + r₂", "mergekit's slerp", on_the_arc,
            check=check_arc, sources=2, meets=True),
        Way("ties", "trimmed, a sign elected for each entry, those that agree averaged", "arXiv 2306.01708",
            entrywise=_ties, reads=("density", "ties_weights", "scale"), density=0.5, meets=True),
        Way("dare", "entries dropped at random, the others enlarged, added by weight", "arXiv 2311.03099",
            entrywise=_dare, reads=("density", "ties_weights", "scale", "seed"), density=0.5),
        Way("dare-ties", "entries dropped at random, the others enlarged, signs elected as in ties", "arXiv 2311.03099",
            entrywise=_dare_ties, reads=("density", "ties_weights", "scale", "seed"), density=0.5, meets=True),
        Way("magnitude-prune", "trimmed to the largest entries, added by weight", "peft's magnitude_prune",
            entrywise=_magnitude_prune, reads=("density", "scale"), density=0.5),
        Way("della", "dropped at random, small entries sooner, signs elected as in ties", "arXiv 2406.11617",
            entrywise=_della, reads=("density", "ties_weights", "scale", "epsilon", "seed"), density=0.5, meets=True),
        Way("breadcrumbs", "without the largest and the smallest entries, added by weight", "arXiv 2312.06795",
            entrywise=_breadcrumbs, reads=("density", "scale", "gamma"), density=0.9),
        Way("knots", "ties on the directions that the sources share", "arXiv 2410.19735",
            factors=_knots, reads=("density", "ties_weights", "scale"), density=0.5, meets=True),
    )
}  # fmt: skip
"""Name -> record."""


def way_of(method: str) -> Way:
    """The record of a method. Raises RequestError, with the nearest names."""
    if method not in WAYS:
        near = did_you_mean(method, WAYS)
        raise RequestError(f"--method {method} is not known; there are {', '.join(WAYS)}{near}")
    return WAYS[method]
