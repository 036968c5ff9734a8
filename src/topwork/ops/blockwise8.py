"""8-bit block-wise dynamic quantization, equal to bitsandbytes' on the CPU bit for bit.

    absmax_b = max |x_i| over block b
    code_i   = table[trunc((clamp(x_i / absmax_b, -1, 1) + 1) / 2 * 65535 + 0.5)]
    table[j] = the nearest of the map's 256 values to 2 j / 65535 - 1
    x_i     ~= map[code_i] * absmax_b

Two things hold the state of 8-bit optimizers and the constants of double-quantized 4-bit weights: a *map* of 256
values in [-1, 1], dense near zero, and each block's largest magnitude. Source of the map: Dettmers et al., 8-bit
Optimizers via Block-wise Quantization (2021), section 2.1.

bitsandbytes has two roundings. Its CPU library (0.50), followed here, rounds to one of 65,536 even steps and looks the
code up: a tie of two codes goes to the lower one only where a step meets it, and magnitudes below 1.5e-5 of the block's
largest are not told apart (a zero in a block that is not all zero becomes the code nearest to 1 / 65535). Its plain
Python form, for devices without a kernel, takes the nearest code itself, a tie to the lower one. A block of zeros has
codes 0 and absmax 0, and so comes back as zeros.
"""

from functools import cache

import torch
from torch import Tensor

_STEPS = 65535


@cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values [256] fp32, rising, that bitsandbytes' `create_dynamic_map` gives. Not to be written to.

    One group of values for each power of ten from 1e-6 to 1, each twice as fine as the one below; then 0 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent if signed else exponent + 1) + 1)
        group = (10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += group + [-value for value in group] if signed else group
    return torch.tensor(sorted(values))


def rounding_table(code: Tensor) -> Tensor:
    """Which of the map's values [256] is nearest to each of 65,536 even steps from -1 to 1: [65536] uint8."""
    steps = 2.0 * torch.arange(_STEPS + 1, dtype=torch.float32, device=code.device) / _STEPS - 1.0
    return torch.bucketize(steps, (code[:-1] + code[1:]) * 0.5).to(torch.uint8)


def quantize_blockwise(x: Tensor, code: Tensor, block_size: int, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Floats of any shape, finite -> codes uint8 in that shape, and absmax fp32 [ceil(numel / block_size)].

    Blocks run through the flat tensor; the last may be shorter. `code` is a map [256] fp32 on x's device, and `table`
    its `rounding_table`, which is made anew when left out.
    """
    table = rounding_table(code) if table is None else table
    flat = x.reshape(-1).float()
    whole = flat.numel() // block_size * block_size
    parts = [flat[:whole].view(-1, block_size), flat[whole:].view(1, -1)]
    absmax, scaled = zip(*(_scaled(part) for part in parts if part.numel())) if flat.numel() else ((flat,), (flat,))
    index = _steps(torch.cat(scaled) if len(scaled) > 1 else scaled[0])
    return table.index_select(0, index).view(x.shape), torch.cat(absmax) if len(absmax) > 1 else absmax[0]


def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, block_size: int) -> Tensor:
    """The fp32 values that codes uint8 of any shape stand for, in that shape. Blocks as in `quantize_blockwise`."""
    values = code.index_select(0, codes.reshape(-1).int())
    whole = values.numel() // block_size * block_size
    values[:whole].view(-1, block_size).mul_(absmax[: whole // block_size, None])
    values[whole:].mul_(absmax[-1:])
    return values.view(codes.shape)


def _scaled(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[blocks, size] -> absmax [blocks] and the flat values in -1..1. In a block of zeros they are all -1: code 0."""
    absmax = blocks.abs().amax(1)  # 20 times as fast as the infinity norm
    scaled = blocks * (1.0 / absmax)[:, None]  # 0 * inf is NaN
    return absmax, scaled.nan_to_num_(nan=-1.0).clamp_(-1.0, 1.0).flatten()


def _steps(scaled: Tensor) -> Tensor:
    """The nearest of the 65,536 steps, int32. The product and the sum round once together, as one C instruction does;
    fp64 holds both exactly."""
    return scaled.add_(1.0).double().mul_(_STEPS / 2).add_(0.5).float().int()
