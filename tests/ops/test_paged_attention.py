"""Attention over blocks beside attention of whole sequences, cut into any passes."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from reference.measure import relative
from topwork.ops.attention import flat_attention
from topwork.ops.attention_reference import AttentionRule
from topwork.ops.paged import BLOCK, block_pool, read_blocks, write_blocks
from topwork.ops.paged_attention import PagedRows, Span, attend_paged, grouped_attention

CPU = torch.device("cpu")
LENGTHS = (75, 1, 32, 33, 130)
RULES = {
    "plain": AttentionRule(0.25),
    "window": AttentionRule(0.25, window=37),
    "softcap": AttentionRule(0.25, softcap=2.0),
    "window and softcap": AttentionRule(0.3, window=5, softcap=1.5),
}
CUTS = {
    "token by token": [1] * 130,
    "whole": [130],
    "chunks": [40, 1, 7, 64, 18],
}
"""How many rows of each sequence a pass has, one pass after the other."""


def tensors(dtype: torch.dtype, heads: int = 4, key_heads: int = 2, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), n, size, generator=generator) for n in (heads, key_heads, key_heads))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def spans_of(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return list(pairwise(bounds))


def cut(
    dtype: torch.dtype, sizes: list[int], rule: AttentionRule, sinks: Tensor | None, spoiled: bool = False
) -> Tensor:
    """What the rows get in passes of these sizes; blocks stand in the pool in no order, and with `spoiled` nothing but
    what is written is a number."""
    q, k, v = tensors(dtype)
    pool = block_pool(40, 2, 16, dtype, CPU)
    for x in pool:
        x.fill_(torch.nan if spoiled else 0)
    order = iter(torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist())
    blocks = [[next(order) for _ in range(-(-length // BLOCK))] for length in LENGTHS]
    done, out = [0] * len(LENGTHS), torch.full_like(q, torch.nan)
    for size in sizes:
        spans, rows = [], []
        for number, (start, stop) in enumerate(spans_of(LENGTHS)):
            count = min(size, stop - start - done[number])
            if count:
                spans.append(Span(len(rows), count, done[number], blocks[number]))
                rows += range(start + done[number], start + done[number] + count)
                done[number] += count
        at = torch.tensor([*rows, 0, 0])  # two rows behind the last
        found = attend_paged(pool, q[at], k[at], v[at], PagedRows(tuple(spans), CPU), rule, sinks)
        assert not found[-2:].any()
        again = torch.zeros_like(q[at])
        grouped_attention(pool, q[at], PagedRows(tuple(spans), CPU), rule, sinks, again)
        assert relative(again, found) < (1e-6 if dtype == torch.float32 else 1e-2)
        out[rows] = found[:-2]
    return out


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])], ids=["", "sinks"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_however_a_text_is_cut_its_rows_get_the_same_bits(dtype: torch.dtype, rule: str, sinks: Tensor | None) -> None:
    """What attention of whole sequences gives them, whatever else lies in the pool. Beside it the form for a GPU."""
    q, k, v = tensors(dtype)
    whole = flat_attention(q, k, v, (0, *(stop for _, stop in spans_of(LENGTHS))), RULES[rule], sinks)
    found = [cut(dtype, sizes, RULES[rule], sinks, spoiled=True) for sizes in CUTS.values()]
    assert relative(found[0], whole) < (1e-6 if dtype == torch.float32 else 1e-2)
    for others in found[1:]:
        assert torch.equal(others, found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_written_is_read(dtype: torch.dtype) -> None:
    pool = block_pool(9, 3, 8, dtype, CPU)
    blocks, count = [7, 0, 4, 2], 3 * BLOCK + 5
    k, v = (torch.randn(count, 3, 8).to(dtype) for _ in range(2))
    for start, stop in ((0, 1), (1, 70), (70, count)):
        write_blocks(pool, k[start:stop], v[start:stop], blocks, start)
    for given in (blocks, torch.tensor(blocks)):
        for seen in (1, BLOCK, BLOCK + 1, count):
            found = read_blocks(pool, given, seen)
            assert torch.equal(found[0], k[:seen])
            assert torch.equal(found[1], v[:seen])
