"""The best factors of a given rank for a dense ΔW, and what they leave out.

ΔW = Σ σᵢ uᵢ vᵢ'; no matrix of rank r is nearer than the sum's first r terms (Eckart and Young). They are found exactly
where the smaller side is at most EXACT, and otherwise by a randomized SVD (Halko, Martinsson, Tropp, 0909.4061): the
range of ΔW's product with a random matrix, multiplied by ΔW and its transpose until it holds no more energy.
"""

import torch
from torch import Generator, Tensor

EXACT = 1024
"""Of the smaller side: a minute's work for a hundred modules of this size, on one core."""
MORE = 16
"""How many more directions than asked for the randomized SVD follows."""
SETTLED = 1e-5
"""Of ΔW's energy: a pass over ΔW that finds less than this much more was the last one."""
PASSES = 24


@torch.no_grad()
def truncated(dense: Tensor, r: int) -> tuple[Tensor, Tensor, float]:
    """ΔW [out, in] -> b [out, r], a [r, in], discarded: b a is the nearest matrix of rank r that was found.

    Each factor has √σ of every term, in fp64, columns of zeros where r is more than either side. `discarded` is
    ‖ΔW - b a‖², measured on these factors. The same ΔW gives the same factors.
    """
    values = dense.double()
    u, sigma, v = _exact(values) if min(values.shape) <= max(EXACT, r + MORE) else _randomized(values, r)
    kept = min(r, len(sigma))
    roots = sigma[:kept].sqrt()
    turned = _signs(u[:, :kept])
    b, a = values.new_zeros(values.shape[0], r), values.new_zeros(r, values.shape[1])
    b[:, :kept], a[:kept] = u[:, :kept] * (turned * roots), v[:kept] * (turned * roots)[:, None]
    return b, a, _energy(values, b, a)


def _exact(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the eigenvectors u of ΔW ΔW', which takes a third of the time of LAPACK's SVD. Directions below 1e-8 of the
    largest σ are mixed with one another, and no product u (u' ΔW) is the worse for it."""
    if values.shape[0] > values.shape[1]:
        v, sigma, u = _exact(values.t())
        return u.t(), sigma, v.t()
    u = torch.linalg.eigh(values @ values.t()).eigenvectors.flip(1)
    rows = u.t() @ values
    sigma = rows.norm(dim=1)
    return u, sigma, rows / sigma.masked_fill(sigma == 0, 1)[:, None]


def _randomized(values: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    width, whole = r + MORE, float(values.square().sum())
    start = torch.randn(values.shape[1], width, dtype=values.dtype, generator=Generator().manual_seed(0))
    basis, held = torch.linalg.qr(values @ start.to(values.device)).Q, -1.0
    for _ in range(PASSES):
        small = basis.t() @ values
        sigma = torch.linalg.svdvals(small)
        found = float(sigma[:r].square().sum())
        if found - held <= SETTLED * whole:
            break
        held = found
        basis = torch.linalg.qr(values @ torch.linalg.qr(small.t()).Q).Q
    u, sigma, v = torch.linalg.svd(basis.t() @ values, full_matrices=False)
    return basis @ u, sigma, v


def _signs(u: Tensor) -> Tensor:
    """An SVD gives each pair of vectors up to their sign: here the largest entry of u is positive."""
    if not u.numel():
        return u.new_ones(u.shape[1])
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(u)


def _energy(values: Tensor, b: Tensor, a: Tensor) -> float:
    """‖values - b a‖², a panel of rows at a time."""
    return sum(float((rows - part @ a).square().sum()) for rows, part in zip(values.split(1024), b.split(1024)))
