"""Keys and values in blocks of tokens: a sequence is a list of blocks, so nothing is copied when one ends or when two
begin alike.

Of one layer a pool holds keys [blocks, H_kv, D / u, BLOCK, u] and values [blocks, H_kv, BLOCK, D], where u values that
follow each other along D stand together (2 of 16 bits, 1 of 32): what a processor multiplies at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 32
"""Tokens of a block."""


def block_pool(blocks: int, heads: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer, not yet written; memory is taken when it is."""
    unit = 4 // dtype.itemsize
    if size % unit:
        raise ValueError(f"heads are {size} wide, where a multiple of {unit} is expected")
    keys = torch.empty(blocks, heads, size // unit, BLOCK, unit, dtype=dtype, device=device)
    return keys, torch.empty(blocks, heads, BLOCK, size, dtype=dtype, device=device)


def write_blocks(pool: tuple[Tensor, Tensor], k: Tensor, v: Tensor, blocks: Sequence[int], first: int) -> None:
    """Put k and v [n, H_kv, D] of the positions first, first + 1, … where the sequence's `blocks` have them."""
    keys, values = pool
    at = torch.arange(first, first + len(k), device=k.device)
    block, offset = torch.tensor(blocks, device=k.device)[at // BLOCK], at % BLOCK
    keys[block, :, :, offset] = k.to(keys.dtype).unflatten(-1, (-1, keys.shape[-1]))
    values[block, :, offset] = v.to(values.dtype)


def read_blocks(pool: tuple[Tensor, Tensor], blocks: Sequence[int] | Tensor, count: int) -> tuple[Tensor, Tensor]:
    """k and v [count, H_kv, D] of a sequence's first positions; `blocks` may be told where the pool is."""
    keys, values = pool
    at = torch.as_tensor(blocks, device=keys.device)[: -(-count // BLOCK)]
    units = keys.view(torch.int32).squeeze(-1).index_select(0, at)  # [n, H_kv, D / u, BLOCK], moved a unit at a time
    k = units.permute(0, 3, 1, 2).contiguous().view(keys.dtype)
    v = values.index_select(0, at).transpose(1, 2)
    return k.flatten(0, 1)[:count], v.flatten(0, 1)[:count]
