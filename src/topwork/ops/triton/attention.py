"""Attention of a flat batch on the GPU, forward and backward; contract: `ops/attention.py`, truth and formulas:
`ops/attention_reference.py`, kernels: `attention_kernels.py`.

A program owns a block of one sequence's rows, queries or keys, for one head, and goes over the blocks of the other kind
that meet it; scores never leave the chip. Gradients of keys and values are summed over the query heads of their group
and gradients of queries over the keys in one program each (two kernels, and one more for sinks), so no two programs add
to the same memory and results are the same bits every time. Which blocks there are is a table made on the host, `work`,
the same for all kernels: those that meet most come first, so that the last programs to end are short ones.

Tiles are fixed by head size, type and device: choosing them by trial would make bits depend on a clock.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from topwork.ops.attention_reference import AttentionRule
from topwork.ops.host import sent
from topwork.ops.triton.attention_kernels import (
    attend,
    attend_backward_keys,
    attend_backward_queries,
    attend_backward_sinks,
)
from topwork.ops.triton.sizes import power_of_2
from topwork.ops.triton.types import dot_type


class Tiles(NamedTuple):
    """Rows a program owns; rows of a step, warps and steps loaded ahead, forward and backward."""

    own: int
    step: int
    warps: int
    stages: int
    step_back: int
    warps_back: int
    stages_back: int


SIXTEEN_BITS = {
    64: Tiles(128, 128, 8, 3, 64, 8, 3),
    128: Tiles(128, 128, 8, 2, 64, 8, 2),
    256: Tiles(64, 32, 4, 2, 32, 8, 2),
}
SIXTEEN_BITS_SMALL = {
    64: Tiles(64, 64, 4, 2, 32, 4, 2),
    128: Tiles(64, 64, 4, 2, 32, 4, 2),
    256: Tiles(32, 32, 4, 2, 16, 4, 2),
}
THIRTY_TWO_BITS = Tiles(32, 16, 8, 2, 16, 8, 2)
"""Tiles by the width of a padded head, within the registers and the shared memory of a multiprocessor: 163 KiB at least
on cards for data centres, whose compute capabilities are `LARGE`, 99 KiB on others. Products of fp32 are made in
registers, which larger ones overflow."""
LARGE = ((8, 0), (9, 0), (10, 0), (10, 3))


def attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], rule: AttentionRule, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out [T, H, D_v] and lse [H, T]."""
    (tokens, heads, _), size_v = query.shape, value.shape[2]
    out = torch.empty(tokens, heads, size_v, dtype=query.dtype, device=query.device)
    lse = torch.empty(heads, tokens, device=query.device)
    tiles = tiles_of(query, value)
    items, count = work(bounds, tiles.own, query.device)
    if count:
        given, unit = _laid_out(query, key, value, out)
        numbers, options = _numbers(rule), _options(query, value, rule, unit)
        with torch.cuda.device_of(query):
            attend[(count * heads,)](
                *given, lse, lse if sinks is None else sinks.contiguous(), items, tokens, heads, heads // key.shape[1],
                *numbers, **options, OWN=tiles.own, STEP=tiles.step, SINKS=sinks is not None, num_warps=tiles.warps,
                num_stages=tiles.stages,
            )  # fmt: skip
    return out, lse


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, bounds: tuple[int, ...],
    rule: AttentionRule, sinks: Tensor | None, into: tuple[Tensor, Tensor, Tensor],
) -> Tensor | None:  # fmt: skip
    """Fills `into`; the sinks' gradient.

    The queries' kernel comes first, since it makes numbers that the keys' kernel takes, and that one reads queries of
    other programs: a gradient that would overwrite queries is held back until both have run. A block of keys and values
    is read for the last time by the program that writes its gradients, which may stand in its place.
    """
    (tokens, heads, _), key_heads = query.shape, key.shape[1]
    held_back = query.untyped_storage().data_ptr() == into[0].untyped_storage().data_ptr()
    written = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if held or x.stride(-1) != 1 else x
        for x, held in zip(into, (held_back, False, False))
    ]
    known = torch.empty(heads, tokens, 4, device=query.device)
    dsinks = None if sinks is None else torch.zeros_like(sinks)
    tiles = tiles_of(query, value)
    items, count = work(bounds, tiles.own, query.device)
    if count:
        given, unit = _laid_out(query, key, value, out, grad, *written)
        inputs, out_at, grad_at, dquery_at, targets_at = (given[i:j] for i, j in pairwise((0, 9, 12, 15, 18, 24)))
        numbers = (heads // key_heads, *_numbers(rule))
        options = _options(query, value, rule, unit) | {
            "OWN": tiles.own, "STEP": tiles.step_back, "num_warps": tiles.warps_back, "num_stages": tiles.stages_back,
        }  # fmt: skip
        with torch.cuda.device_of(query):
            attend_backward_queries[(count * heads,)](
                *inputs, *out_at, *grad_at, *dquery_at, lse, known, items, tokens, heads, *numbers, **options
            )
            attend_backward_keys[(count * key_heads,)](
                *inputs, *grad_at, *targets_at, known, items, tokens, key_heads, *numbers, **options
            )
            if sinks is not None:
                attend_backward_sinks[(heads,)](sinks.contiguous(), known, dsinks, tokens, COLUMNS=1024)
    for target, result in zip(into, written):
        if target is not result:
            target.copy_(result)
    return dsinks


@lru_cache(maxsize=64)
def work(bounds: tuple[int, ...], own: int, device: torch.device) -> tuple[Tensor, int]:
    """The table of blocks of `own` rows on the device, and their number. Kept, because every layer of a pass asks for
    the same one."""
    lines = []
    for start, stop in pairwise(bounds):
        length = stop - start
        last = (length - 1) // own * own
        lines += [(start, length, first, last - first) for first in range(0, length, own)]
    lines.sort(key=lambda line: -line[2])
    return sent(torch.tensor(lines, dtype=torch.int32), device), len(lines)


def tiles_of(query: Tensor, value: Tensor) -> Tiles:
    """By the type, the wider of the two head sizes, and the device."""
    if query.dtype == torch.float32:
        return THIRTY_TWO_BITS
    large = not query.is_cuda or torch.cuda.get_device_capability(query.device) in LARGE
    width = max(64, power_of_2(max(query.shape[2], value.shape[2])))
    return (SIXTEEN_BITS if large else SIXTEEN_BITS_SMALL)[width]


def _options(query: Tensor, value: Tensor, rule: AttentionRule, unit: int) -> dict[str, object]:
    """What all kernels are compiled for: nothing of a batch, whose sequences would change each other's last bits."""
    size, size_v = query.shape[2], value.shape[2]
    return {
        "SIZE": size, "SIZE_V": size_v, "WIDTH": max(16, power_of_2(size)),
        "WIDTH_V": max(16, power_of_2(size_v)), "CAPPED": rule.softcap is not None,
        "WINDOW": rule.window is not None, "UNIT": unit,
        "DOT": dot_type(query.dtype),
    }  # fmt: skip


def _numbers(rule: AttentionRule) -> tuple[float, float, int]:
    """Scale, cap and window, which is added to positions in 32 bits."""
    return float(rule.scale), float(rule.softcap or 1.0), min(rule.window or 0, 1 << 30)


def _laid_out(*tensors: Tensor) -> tuple[list[object], int]:
    """Each tensor [T, H, D] with its distances of rows and heads, in units that are told: of eight values where all
    are multiples of it, so that 16 bytes are known to lie together."""
    rows = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    strides = [step for x in rows for step in x.stride()[:2]]
    unit = 8 if all(step % 8 == 0 for step in strides) else 1
    return [part for x in rows for part in (x, x.stride(0) // unit, x.stride(1) // unit)], unit
