"""How alike two adapters' changes are, module by module, without a dense matrix where both have factors.

    cosine       <ΔW_A, ΔW_B> / (‖ΔW_A‖ ‖ΔW_B‖)
    in columns   ‖U U' ΔW_A‖² / ‖ΔW_A‖², U an orthonormal basis of ΔW_B's column space: how much of what A writes B
                 can write too; a ΔW_A of noise has about r_B / out
    in rows      ‖ΔW_A V V'‖² / ‖ΔW_A‖², V of its row space: how much of what A reads B reads too; noise r_B / in

Over all modules, norms and inner products add up as squares do. A change that is dense (DoRA, IA3) spans everything,
so nothing is told of what lies in it; what of it lies in the other's factors is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.merging.changes import Changes
from topwork.merging.deltas import Delta, DenseDelta, LowRankDelta, as_matrix, inner, singular_values

NOTHING = 1e-7
"""Of the largest singular value: a direction below it is rounding's own (factors come as fp32)."""


@dataclass(frozen=True)
class Likeness:
    """One module's, or all modules'. Shares are of ‖ΔW‖²; None where they have no meaning.

    norms    of A's change and B's
    cosine   None where one of them is zero
    columns  (of A in B's column space, of B in A's)
    rows     (of A in B's row space, of B in A's)
    base     ‖W‖ of the base, where it was looked at
    """

    norms: tuple[float, float]
    cosine: float | None
    columns: tuple[float | None, float | None]
    rows: tuple[float | None, float | None]
    base: float | None = None


def likeness(
    first: Changes, second: Changes, base_norm: Callable[[str], float] | None = None
) -> dict[str, Likeness]:  # fmt: skip
    """By module, in the model's order, of every module that either adapts, and then by parameter of those that either
    trained whole. `base_norm` gives ‖W‖ by a parameter's name. Tokens' rows are left out."""
    whole = sorted({*first.whole, *second.whole})
    adapted = {*first.adapted, *second.adapted} - {path for path, _ in whole}
    found = {}
    for path in first.bare.modules:
        if path in adapted:
            one, other = (source.delta(path) if path in source.adapted else None for source in (first, second))
            found[path] = compared(one, other, None if base_norm is None else base_norm(f"{path}.weight"))
    for path, name in whole:
        changes = (source.of_parameter(path, name) for source in (first, second))
        one, other = (None if change is None else DenseDelta(as_matrix(change)) for change in changes)
        found[f"{path}.{name}"] = compared(one, other, None if base_norm is None else base_norm(f"{path}.{name}"))
    return found


@torch.no_grad()
def compared(first: Delta | None, second: Delta | None, base: float | None = None) -> Likeness:
    """One module's two changes, None where one leaves it alone."""
    norms = (first.norm() if first is not None else 0.0, second.norm() if second is not None else 0.0)
    if first is None or second is None or 0.0 in norms:
        return Likeness(norms, None, (None, None), (None, None), base)
    cosine = inner(first, second) / (norms[0] * norms[1])
    one, other = _spaces(first), _spaces(second)
    columns = (_share_in(first, norms[0], other, 0), _share_in(second, norms[1], one, 0))
    rows = (_share_in(first, norms[0], other, 1), _share_in(second, norms[1], one, 1))
    return Likeness(norms, cosine, columns, rows, base)


def overall(found: Sequence[Likeness]) -> Likeness:
    """Over modules: the deltas as one long vector each. What lies in the other, lies in modules that both
    change; it is a share of all."""
    squares = [sum(each.norms[side] ** 2 for each in found) for side in (0, 1)]
    norms = (math.sqrt(squares[0]), math.sqrt(squares[1]))
    products = [each.cosine * each.norms[0] * each.norms[1] for each in found if each.cosine is not None]
    cosine = math.fsum(products) / (norms[0] * norms[1]) if products and 0.0 not in norms else None
    bases = [each.base for each in found if each.base is not None]

    def share(side: int, shares: Callable[[Likeness], tuple[float | None, float | None]]) -> float | None:
        known = [(each.norms[side] ** 2, value) for each in found if (value := shares(each)[side]) is not None]
        return sum(w * v for w, v in known) / squares[side] if known and squares[side] else None

    return Likeness(
        norms,
        cosine,
        (share(0, lambda each: each.columns), share(1, lambda each: each.columns)),
        (share(0, lambda each: each.rows), share(1, lambda each: each.rows)),
        math.sqrt(sum(base**2 for base in bases)) if len(bases) == len(found) else None,
    )


def _spaces(delta: Delta) -> tuple[Tensor, Tensor] | None:
    """Orthonormal bases [out, k] and [in, k] of its column and row space; None of a dense one."""
    if not isinstance(delta, LowRankDelta):
        return None
    u, s, v = singular_values(delta)
    kept = int((s > NOTHING * s[0]).sum())
    return u[:, :kept], v[:kept].t()


def _share_in(delta: Delta, norm: float, spaces: tuple[Tensor, Tensor] | None, side: int) -> float | None:
    """Of ‖ΔW‖², what lies in the other's column space (side 0) or row space (side 1)."""
    if spaces is None:
        return None
    basis = spaces[side]
    if isinstance(delta, LowRankDelta):
        b, a = (basis.t() @ delta.b, delta.a) if side == 0 else (delta.b, delta.a @ basis)
        projected = LowRankDelta(b, a).norm()
    else:
        values = delta.dense()
        projected = float((basis.t() @ values if side == 0 else values @ basis).norm())
    return min(projected**2 / norm**2, 1.0)
