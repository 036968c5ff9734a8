"""The steps of decode.c one by one against plain torch in fp64, odd shapes included, and against themselves: a row's
results are the same bits whatever is computed beside it."""

import ctypes
from array import array
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.measure import relative
from topwork.ops import decode as c
from topwork.ops.attention_reference import AttentionRule, forward_reference
from topwork.ops.native import load as native
from topwork.ops.packed import pack_4bit, pack_int8
from topwork.ops.paged import BLOCK, block_pool, read_blocks, write_blocks

pytestmark = pytest.mark.skipif(native.compiled("decode") is None, reason="no C compiler, or TOPWORK_NO_NATIVE")
TYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def test_structures_are_as_long_as_in_c() -> None:
    library = native.compiled("decode")
    assert library is not None
    assert [library.topwork_decode_sizes(at) for at in range(len(c.STRUCTURES))] == list(
        map(ctypes.sizeof, c.STRUCTURES)
    )


def run(
    steps: Sequence[c.Step], rows: int, dtype: torch.dtype, segments: Sequence[tuple[int, int, Any]] = (),
    runs: Sequence[tuple[int, int, int, list[int]]] = (), width: int = 4096, threads: int = 2, **told: bool,
) -> None:  # fmt: skip
    """`segments` are (start, stop, parts or None), `runs` (start, stop, first position, blocks)."""
    spans = [c.Segment(a, b, None if parts is None else c.address_of(parts)) for a, b, parts in segments]
    there = c.array_of(spans or [c.Segment(0, rows, None)])
    blocks = [array("i", own) for *_, own in runs]
    laid = c.array_of([c.Run(a, b, f, own.buffer_info()[0]) for (a, b, f, _), own in zip(runs, blocks)] or [c.Run()])
    run_of = array("i", [number for number, (a, b, *_) in enumerate(runs) for _ in range(b - a)] or [0])
    scratch = torch.full((threads, c.scratch_floats(rows, width, 64, 256)), float("nan"))
    over = c.Pass(
        rows=rows, segments=len(there), runs=len(runs), segment=c.address_of(there), run=c.address_of(laid),
        run_of=run_of.buffer_info()[0], scratch=scratch.data_ptr(), scratch_each=scratch.shape[1], threads=threads,
        **told,
    )  # fmt: skip
    c.run_steps(c.array_of(steps), over, dtype)


def outputs(x: Tensor, weights: Sequence[c.Weight], out_dtype: torch.dtype, threads: int = 2) -> Tensor:
    """x times the weights, side by side."""
    there = c.array_of(weights)
    out = torch.full((len(x), sum(weight.n for weight in weights)), float("nan"), dtype=out_dtype)
    step = c.Step(
        op=c.PRODUCTS, in_=x.data_ptr(), in_by=x.stride(0), out=out.data_ptr(), out_by=out.shape[1],
        out_kind=native.KINDS[out_dtype], count=len(weights), weights=c.address_of(there),
    )  # fmt: skip
    run([step], len(x), x.dtype, width=x.shape[1], threads=threads)
    return out


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "n", "k"), product([1, 2, 4, 7, 70], [1, 16, 33, 100], [1, 31, 64, 97]))
def test_products(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    kept, x = c.Kept(), torch.randn(rows, k).to(dtype)
    dense = [torch.randn(n, k).to(dtype), torch.randn(5, k).to(dtype)]
    bias = torch.randn(n)
    weights = [c.weight_of(dense[0], bias, dtype, kept), c.weight_of(dense[1], None, dtype, kept)]
    found = outputs(x, weights, torch.float32)
    expected = torch.cat([x.double() @ w.double().t() for w in dense], 1)
    expected[:, :n] += bias
    assert relative(found, expected) < 1e-6
    alone = torch.cat([outputs(row[None], weights, torch.float32, threads=1) for row in x])
    assert torch.equal(found, alone)
    assert torch.equal(outputs(x, weights, dtype).float(), found.to(dtype).float())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "k"), [(33, 64), (16, 96), (5, 130), (40, 31)])
def test_packed_weights_are_their_dense_values(n: int, k: int, dtype: torch.dtype) -> None:
    """Blocks that cross rows and codes that begin within a byte, too."""
    weight, x, kept = torch.randn(n, k).to(dtype), torch.randn(9, k).to(dtype), c.Kept()
    kinds = [("nf4", 64, True), ("nf4", 64, False), ("fp4", 128, True)]
    for packed in [*(pack_4bit(weight, *kind) for kind in kinds), pack_int8(weight)]:
        found = outputs(x, [c.weight_of(packed, None, dtype, kept)], torch.float32)
        assert torch.equal(found, outputs(x, [c.weight_of(packed.dense(), None, dtype, kept)], torch.float32))


def test_a_weight_that_would_be_rounded_otherwise_is_left_to_torch() -> None:
    kept, weight = c.Kept(), torch.randn(8, 64)
    assert c.weight_of(weight.bfloat16(), None, torch.float32, kept) is None
    assert c.weight_of(weight.t().contiguous().t(), None, torch.float32, kept) is None
    assert c.weight_of(pack_4bit(weight.bfloat16(), "nf4", 64, True), None, torch.float32, kept) is None
    assert c.weight_of(pack_4bit(weight, "nf4", 64, True), None, torch.bfloat16, kept) is not None


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rank", [1, 2, 5, 16, 33])
def test_terms_shifts_and_gains(rank: int, dtype: torch.dtype) -> None:
    """One segment of each kind and one of none; then every row alone."""
    n, k, kept = 37, 50, c.Kept()
    x, weight, bias = torch.randn(11, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n)
    a, b = torch.randn(rank, k).to(dtype), torch.randn(n, rank).to(dtype)
    gain, shift, other = 1 + torch.randn(n), torch.randn(n), torch.randn(n, k).to(dtype)
    parts = [(c.Part * 1)() for _ in range(4)]
    for part in parts[:2]:
        part[0].a, part[0].b, part[0].rank, part[0].alpha = kept.at(a), kept.at(c.packed_ranks(b, dtype)), rank, 0.7
    parts[1][0].gain, parts[1][0].leaves_bias = kept.at(gain), True
    parts[2][0].gain, parts[2][0].shift = kept.at(gain), kept.at(shift)
    parts[3][0].weight = kept.at(other)
    base = x.double() @ weight.double().t() + bias
    inner = (x.double() @ a.double().t()).to(dtype).double()
    with_terms = base + 0.7 * inner @ b.double().t()
    expected = [
        base,
        with_terms,
        with_terms * gain - (gain - 1) * bias,
        (base + shift) * gain,
        x.double() @ other.double().t(),
    ]
    whose = [None, 0, 0, 0, 1, 2, 2, 3, 3, None, 1]
    found = []
    for rows in [range(11), *([row] for row in range(11))]:
        own, mine = x[list(rows)].contiguous(), [whose[row] for row in rows]
        there, out = c.array_of([c.weight_of(weight, bias, dtype, kept)]), torch.empty(len(own), n)
        s = torch.full((len(own), rank + 4), float("nan"), dtype=dtype)
        common: dict[str, Any] = {
            "in_": own.data_ptr(), "in_by": k, "count": 1, "weights": c.address_of(there), "inner": s.data_ptr(),
            "inner_by": rank + 4,
        }  # fmt: skip
        steps = [
            c.Step(op=c.INNER, **common),
            c.Step(op=c.PRODUCTS, out=out.data_ptr(), out_by=n, out_kind=0, **common),
        ]
        spans = [(at, at + 1, None if at_ is None else parts[at_]) for at, at_ in enumerate(mine)]
        run(steps, len(own), dtype, spans, width=k, terms=True)
        found.append(out)
    for row, name in enumerate(whose):
        truth = expected[0 if name is None else name + 1][row]
        assert relative(found[0][row], truth) < (1e-6 if dtype == torch.float32 else 3e-3)
    assert torch.equal(found[0], torch.cat(found[1:]))


def test_a_gain_on_inputs() -> None:
    x, gain, kept = torch.randn(4, 19), torch.randn(19), c.Kept()
    part, before = (c.Part * 1)(), x.clone()
    part[0].input_gain = kept.at(gain)
    step = c.Step(op=c.SCALE, out=x.data_ptr(), out_by=19, width=19)
    run([step], 4, torch.float32, [(0, 1, None), (1, 3, part), (3, 4, None)], input_gains=True)
    assert torch.equal(x, torch.cat([before[:1], before[1:3] * gain, before[3:]]))


RULES = [
    AttentionRule(0.3), AttentionRule(0.3, window=7), AttentionRule(0.3, window=40), AttentionRule(0.5, softcap=1.5),
    AttentionRule(0.2, window=33, softcap=2.0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("heads", "group", "size"), [(2, 3, 16), (1, 1, 64), (3, 5, 40), (1, 2, 128)])
def test_attention(heads: int, group: int, size: int, rule: AttentionRule, dtype: torch.dtype) -> None:
    """Sequences of several blocks, some rows of each, with and without sinks; memory that was never written is NaN."""
    lengths, asked = (1, 32, 33, 70, 100), (1, 2, 33, 11, 1)
    pool = block_pool(16, heads, size, dtype, torch.device("cpu"))
    for tensor in pool:
        tensor.fill_(float("nan"))
    free, runs, queries, truth, sinks = iter([7 * at % 16 for at in range(16)]), [], [], [], torch.randn(heads * group)
    for length, some in zip(lengths, asked):
        blocks = [next(free) for _ in range(-(-length // BLOCK))]
        q, k, v = (torch.randn(length, count, size).to(dtype) for count in (heads * group, heads, heads))
        write_blocks(pool, k, v, blocks, 0)
        assert all(map(torch.equal, read_blocks(pool, blocks, length), (k, v)))
        start = runs[-1][1] if runs else 0
        runs.append((start, start + some, length - some, blocks))
        queries.append(q[-some:])
        truth.append([
            forward_reference(q.double(), k.double(), v.double(), (0, length), rule, with_sinks)[-some:]
            for with_sinks in (None, sinks.double())
        ])  # fmt: skip
    x = torch.cat(queries).flatten(1)

    def attended(runs: Sequence[tuple[int, int, int, list[int]]], x: Tensor, with_sinks: bool) -> Tensor:
        out = torch.empty_like(x)
        how = c.Attend(
            keys=pool[0].data_ptr(), values=pool[1].data_ptr(), heads=heads, size=size, group=group, scale=rule.scale,
            softcap=rule.softcap or 0, window=rule.window or 0, sinks=sinks.data_ptr() if with_sinks else None,
        )  # fmt: skip
        width = x.shape[1]
        step = c.Step(op=c.ATTEND, in_=x.data_ptr(), in_by=width, out=out.data_ptr(), out_by=width, attend=how)
        run([step], len(x), dtype, runs=runs)
        return out

    for number in (0, 1):
        found = attended(runs, x, bool(number))
        assert relative(found, torch.cat([pair[number] for pair in truth]).flatten(1)) < CLOSE[dtype]
        alone = [
            attended([(0, 1, first + row - start, blocks)], x[row : row + 1].contiguous(), bool(number))
            for start, stop, first, blocks in runs
            for row in range(start, stop)
        ]
        assert torch.equal(found, torch.cat(alone))
