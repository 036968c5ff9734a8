"""Methods that are a sum Σ cᵢ ΔWᵢ, each by its coefficients; the sum is exact in factors (`deltas.weighted_sum`).

    cat, task-arithmetic, svd    cᵢ = wᵢ                           (Ilharco et al., arXiv 2212.04089)
    linear                       cᵢ = wᵢ / Σ w                     mergekit's `linear`, on what the models differ by
    slerp                        sin((1-t)θ)/sin θ, sin(tθ)/sin θ  t = w₂/(w₁+w₂), θ the angle between the two deltas

In slerp the angle is each module's own, and where |cos θ| > 0.9995 the line is straight, as in mergekit. Where one of
the two leaves a module alone there is no angle, and the line to zero is straight too.
"""

import math
from collections.abc import Sequence

from topwork.common.errors import RequestError
from topwork.merging.deltas import Delta, inner

STRAIGHT = 0.9995
"""|cos| from which on two deltas count as parallel."""


def as_weighted(deltas: Sequence[Delta], weights: Sequence[float]) -> list[float]:  # noqa: ARG001
    """The weights themselves."""
    return list(weights)


def as_mean(deltas: Sequence[Delta], weights: Sequence[float]) -> list[float]:  # noqa: ARG001
    """The weights over their sum, of all sources: one that leaves the module alone counts as zero."""
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def check_mean(weights: Sequence[float]) -> None:
    """RequestError for weights that sum to zero."""
    if abs(math.fsum(weights)) < 1e-8:
        raise RequestError(
            f"--weights {_told(weights)} sum to zero, and linear divides by the sum; --method task-arithmetic does not"
        )


def check_arc(weights: Sequence[float]) -> None:
    """RequestError for weights that give no t from 0 to 1."""
    if min(weights) < 0:
        raise RequestError(
            f"--weights {_told(weights)}: slerp goes from the first source (1,0) to the second (0,1); give two weights "
            "of zero or more"
        )


def on_the_arc(deltas: Sequence[Delta], weights: Sequence[float]) -> list[float]:
    """slerp's two coefficients."""
    first, second = weights
    t, norms = second / (first + second), [delta.norm() for delta in deltas]
    if min(norms) == 0:
        return [1 - t, t]
    cosine = inner(*deltas) / (norms[0] * norms[1])
    if abs(cosine) > STRAIGHT:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def _told(weights: Sequence[float]) -> str:
    return ",".join(f"{weight:g}" for weight in weights)
