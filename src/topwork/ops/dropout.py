"""Dropout whose draws are a function of the token and the layer, so nothing of it is kept and nothing changes it:
neither the other adapters of a pass, nor how rows were packed, nor that a layer is run again going backward.

    y[t, c] = x[t, c] / (1 - p)   where h(h(seeds[t] ^ key) ^ (c + 1) G) >= 2^32 p,   else 0

All of it is in 32 bits; h mixes them (two multiplications and three shifts, from Wellons' hash-prospector), and G is
2^32 over the golden ratio. `seeds` holds a number for each token, from its adapter's seed, the step, the row and the
position (`token_seeds`); `key` is the layer's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.ops.native import load as native
from topwork.ops.native.load import told
from topwork.ops.rows import rows_at_once
from topwork.ops.triton import load as triton

BITS = 0xFFFFFFFF
GOLDEN = 0x9E3779B9


@dataclass(frozen=True)
class Dropout:
    """What rows lose on their way into a layer's adapter: a share p of their values, 0 <= p < 1; seeds [rows] int64."""

    p: float
    key: int
    seeds: Tensor

    @property
    def least(self) -> int:
        """The least hash of a value that stays."""
        return min(round(self.p * 2**32), BITS)

    @property
    def scale(self) -> float:
        return 1 / (1 - self.p)


def token_seeds(seeds: Tensor, positions: Tensor) -> Tensor:
    """Seeds [T] from each token's row, by its seed [T], and its position in it [T]; all int64."""
    return _mixed(seeds ^ _weyl(positions))


def dropped(x: Tensor, dropout: Dropout) -> Tensor:
    """x [rows, d] with values dropped, and its gradient."""
    return _Dropped.apply(x, dropout)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropout):  # type: ignore[no-untyped-def]
        ctx.dropout = dropout
        return drop(x, dropout, torch.empty_like(x, memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return drop(dy, ctx.dropout, torch.empty_like(dy, memory_format=torch.contiguous_format)), None


def drop(x: Tensor, dropout: Dropout, out: Tensor, add: bool = False) -> Tensor:
    """`out` [rows, d] becomes, or with `add` gets on top, x with values dropped. Raises ValueError for other shapes."""
    _check(x, dropout, out)
    plain = native.contiguous_rows(x) and native.contiguous_rows(out)
    if plain and (library := native.kernels("layer", x)):
        seeds = dropout.seeds.contiguous()
        library.topwork_drop(
            x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), *x.shape, seeds.data_ptr(), dropout.key,
            dropout.least, dropout.scale, (x.dtype == torch.bfloat16) + 2 * add, torch.get_num_threads(),
        )  # fmt: skip
    elif (kernels := triton.kernels("layer", x)) and out.stride(1) == 1:
        kernels.drop(x, dropout.seeds, dropout.key, dropout.least, dropout.scale, out, add)
    else:
        drop_reference(x, dropout, out, add)
    return out


def drop_reference(x: Tensor, dropout: Dropout, out: Tensor, add: bool = False) -> None:
    """The truth, some rows at a time."""
    step = rows_at_once(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    for rows, seeds, into in zip(x.split(step), dropout.seeds.split(step), out.split(step)):
        value = torch.where(stays(dropout, seeds, x.shape[1]), rows.to(wide) * dropout.scale, 0.0)
        into.copy_(into + value if add else value)


def stays(dropout: Dropout, seeds: Tensor, columns: int) -> Tensor:
    """Whether each value stays: bool [rows, columns]."""
    row = _mixed(seeds ^ dropout.key)
    column = _weyl(torch.arange(columns, device=seeds.device))
    return _mixed(row[:, None] ^ column) >= dropout.least


def _mixed(x: Tensor) -> Tensor:
    """h of uint32 that are held as int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & BITS
    return x ^ (x >> 16)


def _weyl(x: Tensor) -> Tensor:
    return ((x + 1) * GOLDEN) & BITS


def _check(x: Tensor, dropout: Dropout, out: Tensor) -> None:
    """Kernels see bare memory."""
    seeds = dropout.seeds
    if x.ndim != 2 or x.shape != out.shape or x.dtype != out.dtype or not x.device == out.device == seeds.device:
        raise ValueError(f"cannot drop values of {told(x)} into {told(out)} by {told(seeds)}, expected [rows, d] twice")
    if seeds.shape != x.shape[:1] or seeds.dtype != torch.int64:
        raise ValueError(f"the seeds are {told(seeds)}, expected int64 [{x.shape[0]}] for x {told(x)}")
    if not 0 <= dropout.p < 1:
        raise ValueError(f"p is {dropout.p}, expected 0 <= p < 1")
