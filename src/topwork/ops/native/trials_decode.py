"""What decode.c is tried with: each of its steps, over rows of several adapters and sequences, beside plain torch.

A whole pass has its truth in a model's own modules (`generation/module_runner.py`), which are not loaded for a proof.
"""

import ctypes
from array import array
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from topwork.ops import decode as c
from topwork.ops.attention_reference import AttentionRule, forward_reference
from topwork.ops.gated import gated_reference
from topwork.ops.native import load
from topwork.ops.norm import rms_norm_reference
from topwork.ops.packed import pack_4bit, pack_int8
from topwork.ops.paged import BLOCK, block_pool, read_blocks, write_blocks
from topwork.ops.rotary import rotate_reference_

Found = tuple[str, Tensor, Tensor, float]
"""What, the result, the true one, and how far off it may be."""
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def decode() -> list[Found]:
    """All steps in both types, and the structures' sizes."""
    library = load.compiled("decode")
    assert library is not None
    sizes = torch.tensor([library.topwork_decode_sizes(at) for at in range(len(c.STRUCTURES))])
    cases = [("the structures' sizes", sizes, torch.tensor([*map(ctypes.sizeof, c.STRUCTURES)]), 0.0)]
    for dtype in LIMITS:
        cases += [*_products(dtype), *_terms(dtype), *_stream(dtype), *_gated(dtype), *_heads(dtype)]
        for rule in (AttentionRule(0.3), AttentionRule(0.3, window=7), AttentionRule(0.5, softcap=1.5)):
            cases += _attention(dtype, rule)
    return cases


def _run(
    steps: Sequence[c.Step], rows: int, dtype: torch.dtype, segments: Sequence[tuple[int, int, Any]] = (),
    runs: Sequence[tuple[int, int, int, list[int]]] = (), width: int = 600, **told: bool,
) -> None:  # fmt: skip
    """`segments` are (start, stop, parts or None), `runs` (start, stop, first position, blocks)."""
    threads = torch.get_num_threads()
    spans = c.array_of([c.Segment(a, b, None if p is None else c.address_of(p)) for a, b, p in segments] or [
        c.Segment(0, rows, None)
    ])  # fmt: skip
    blocks = [array("i", own) for *_, own in runs]
    laid = c.array_of([c.Run(a, b, f, own.buffer_info()[0]) for (a, b, f, _), own in zip(runs, blocks)] or [c.Run()])
    run_of = array("i", [number for number, (a, b, *_) in enumerate(runs) for _ in range(b - a)] or [0])
    scratch = torch.full((threads, c.scratch_floats(rows, width, 64, 256)), torch.nan)
    over = c.Pass(
        rows=rows, segments=len(spans), runs=len(runs), segment=c.address_of(spans), run=c.address_of(laid),
        run_of=run_of.buffer_info()[0], scratch=scratch.data_ptr(), scratch_each=scratch.shape[1], threads=threads,
        **told,
    )  # fmt: skip
    c.run_steps(c.array_of(steps), over, dtype)


def _products(dtype: torch.dtype) -> list[Found]:
    """Dense and packed weights side by side, one of them with a bias."""
    cases: list[Found] = []
    for rows, n, k in product((1, 5, 70), (16, 33), (31, 128)):
        kept, x, weight, bias = c.Kept(), torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n)
        packed = [pack_4bit(weight, "nf4", 64, True), pack_int8(weight)]
        weights = [c.weight_of(weight, bias, dtype, kept), *(c.weight_of(one, None, dtype, kept) for one in packed)]
        given = [one for one in weights if one is not None]
        there, out = c.array_of(given), torch.full((rows, n * len(given)), torch.nan)
        step = c.Step(
            op=c.PRODUCTS, in_=x.data_ptr(), in_by=k, out=out.data_ptr(), out_by=out.shape[1], out_kind=0,
            count=len(given), weights=c.address_of(there),
        )  # fmt: skip
        _run([step], rows, dtype, width=k)
        values = [weight.double(), *(one.dense().double() for one in packed)]
        truth = torch.cat([x.double() @ value.t() for value in values], 1)
        truth[:, :n] += bias
        cases.append((f"products of {rows} × {n} × {k} in {_told(dtype)}", out, truth, 1e-5))
    return cases


def _terms(dtype: torch.dtype) -> list[Found]:
    """Rows of no adapter, of one with terms, of one with terms, a gain and a shift."""
    n, k, rank, kept = 37, 50, 5, c.Kept()
    x, weight = torch.randn(11, k).to(dtype), torch.randn(n, k).to(dtype)
    a, b, gain, shift = torch.randn(rank, k).to(dtype), torch.randn(n, rank).to(dtype), torch.randn(n), torch.randn(n)
    parts = [(c.Part * 1)(), (c.Part * 1)()]
    for part in parts:
        part[0].a, part[0].b, part[0].rank, part[0].alpha = kept.at(a), kept.at(c.packed_ranks(b, dtype)), rank, 0.7
    parts[1][0].gain, parts[1][0].shift = kept.at(gain), kept.at(shift)
    there, out = c.array_of([c.weight_of(weight, None, dtype, kept)]), torch.full((11, n), torch.nan)  # type: ignore[list-item]
    inner = torch.full((11, rank + 4), torch.nan).to(dtype)
    common: dict[str, Any] = {
        "in_": x.data_ptr(), "in_by": k, "count": 1, "weights": c.address_of(there), "inner": inner.data_ptr(),
        "inner_by": rank + 4,
    }  # fmt: skip
    made = c.Step(op=c.PRODUCTS, out=out.data_ptr(), out_by=n, out_kind=0, **common)
    _run([c.Step(op=c.INNER, **common), made], 11, dtype, [(0, 3, None), (3, 7, parts[0]), (7, 11, parts[1])],
         width=k, terms=True)  # fmt: skip
    base = x.double() @ weight.double().t()
    terms = base + 0.7 * (x.double() @ a.double().t()).to(dtype).double() @ b.double().t()
    truth = torch.cat([base[:3], terms[3:7], (terms[7:] + shift) * gain])
    return [(f"terms in {_told(dtype)}", out, truth, LIMITS[dtype])]


def _stream(dtype: torch.dtype) -> list[Found]:
    """The residual sum, and its branch with a norm."""
    rows, width = 7, 83
    stream, y, weight = torch.randn(rows, width), torch.randn(rows, width).to(dtype), torch.randn(width)
    truth, out = stream + 0.7 * y.float(), torch.full((rows, width), torch.nan).to(dtype)
    step = c.Step(
        op=c.BRANCH, in_=y.data_ptr(), in_by=width, out=out.data_ptr(), out_by=width, width=width,
        stream=stream.data_ptr(), multiplier=0.7, norm=weight.data_ptr(), eps=1e-5,
    )  # fmt: skip
    _run([step], rows, dtype, width=width)
    again = out.clone()
    _run([c.Step(op=c.NORM, out=again.data_ptr(), out_by=width, width=width, norm=weight.data_ptr(), eps=1e-5)], rows,
         dtype, width=width)  # fmt: skip
    branch = rms_norm_reference(truth.to(dtype), weight, 1e-5)[0]
    return [
        (f"the stream in {_told(dtype)}", stream, truth, 1e-5),
        (f"a branch in {_told(dtype)}", out, branch, LIMITS[dtype]),
        (f"a norm in {_told(dtype)}", again, rms_norm_reference(out, weight, 1e-5)[0], LIMITS[dtype]),
    ]


def _gated(dtype: torch.dtype) -> list[Found]:
    rows, width, cases = 5, 530, []
    for activation, kind in enumerate(c.ACTIVATIONS):
        both, out = torch.randn(rows, 2 * width).to(dtype), torch.full((rows, width), torch.nan).to(dtype)
        step = c.Step(
            op=c.GATED, in_=both.data_ptr(), in_by=2 * width, out=out.data_ptr(), out_by=width, width=width,
            activation=activation,
        )  # fmt: skip
        _run([step], rows, dtype)
        truth = gated_reference(both[:, :width], both[:, width:], kind)
        cases.append((f"gated units ({kind}) in {_told(dtype)}", out, truth, LIMITS[dtype]))
    return cases


def _heads(dtype: torch.dtype) -> list[Found]:
    """Queries and keys turned, keys and values put into their blocks."""
    rows, first, heads, group, size = 5, 30, 2, 3, 16
    blocks, pool = [3, 1], block_pool(4, heads, size, dtype, torch.device("cpu"))
    for tensor in pool:
        tensor.zero_()
    both = torch.randn(rows, (group + 2) * heads, size).to(dtype)
    angles, truth = torch.randn(first + rows, size), both.clone()
    cos, sin = angles.cos(), angles.sin()
    rotate_reference_(truth[:, : (group + 1) * heads], cos[first:], sin[first:])
    attend = c.Attend(keys=pool[0].data_ptr(), values=pool[1].data_ptr(), heads=heads, size=size, group=group, scale=1)
    step = c.Step(
        op=c.HEADS, out=both.data_ptr(), out_by=both[0].numel(), attend=attend, cos=cos.data_ptr(), sin=sin.data_ptr(),
        turned=size,
    )  # fmt: skip
    _run([step], rows, dtype, runs=[(0, rows, first, blocks)])
    expected = block_pool(4, heads, size, dtype, torch.device("cpu"))
    for tensor in expected:
        tensor.zero_()
    write_blocks(expected, truth[:, group * heads : (group + 1) * heads], truth[:, -heads:], blocks, first)
    pairs = zip(read_blocks(pool, blocks, first + rows), read_blocks(expected, blocks, first + rows))
    return [
        (f"heads in {_told(dtype)}", both, truth, LIMITS[dtype]),
        *((f"keys and values in {_told(dtype)}", mine, its, LIMITS[dtype]) for mine, its in pairs),
    ]


def _attention(dtype: torch.dtype, rule: AttentionRule) -> list[Found]:
    """The last rows of sequences of one block and of several."""
    heads, group, size = 2, 3, 40
    pool = block_pool(8, heads, size, dtype, torch.device("cpu"))
    for tensor in pool:
        tensor.fill_(torch.nan)
    runs: list[tuple[int, int, int, list[int]]] = []
    free, queries, truth = iter((5, 0, 7, 2, 4, 1)), [], []
    for length, some in ((1, 1), (33, 33), (70, 11)):
        blocks = [next(free) for _ in range(-(-length // BLOCK))]
        q, k, v = (torch.randn(length, count, size).to(dtype) for count in (heads * group, heads, heads))
        write_blocks(pool, k, v, blocks, 0)
        start = runs[-1][1] if runs else 0
        runs.append((start, start + some, length - some, blocks))
        queries.append(q[-some:])
        truth.append(forward_reference(q.double(), k.double(), v.double(), (0, length), rule)[-some:])
    x = torch.cat(queries).flatten(1)
    out, width = torch.full_like(x, torch.nan), x.shape[1]
    how = c.Attend(
        keys=pool[0].data_ptr(), values=pool[1].data_ptr(), heads=heads, size=size, group=group, scale=rule.scale,
        softcap=rule.softcap or 0, window=rule.window or 0,
    )  # fmt: skip
    step = c.Step(op=c.ATTEND, in_=x.data_ptr(), in_by=width, out=out.data_ptr(), out_by=width, attend=how)
    _run([step], len(x), dtype, runs=runs)
    return [(f"attention in {_told(dtype)}", out, torch.cat(truth).flatten(1), LIMITS[dtype])]


def _told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
