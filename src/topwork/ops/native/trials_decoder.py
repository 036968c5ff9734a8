"""What decoder.c is tried with: feed-forward layers and whole decoder layers, forward and backward, beside plain torch.

No other kernel is there while one is tried: attention is plain torch too, which C calls through Python.
"""

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from topwork.ops import decoder_layer as whole
from topwork.ops import feedforward as half
from topwork.ops.attention_reference import AttentionRule, backward_reference, forward_reference
from topwork.ops.bundles import LowRank
from topwork.ops.decoder_layer import DecoderLayer
from topwork.ops.decoder_memory import gradient_of, stream_of
from topwork.ops.dropout import Dropout, token_seeds
from topwork.ops.feedforward import FeedForward, Source
from topwork.ops.norm import rms_norm
from topwork.ops.parts import Placed, on_amx
from topwork.ops.prologues import RmsNorm
from topwork.ops.self_attention import HeadNorm, Heads, SelfAttention

Found = tuple[str, Tensor, Tensor, float]
"""What, the result, the true one, and how far off it may be."""
ROUNDED, OFTEN = 2e-2, 0.25
"""In bf16: rounded once; and a dozen times one after the other, of which the worst value of a layer's was 0.11 off."""
BOUNDS = (0, 37, 38, 70)


def decoder() -> list[Found]:
    """All of it; whole layers where the kernel is made for AMX, as the ops that call it ask first."""
    cases = list(feedforward())
    if on_amx():
        return [*cases, *decoder_layers()]
    with suppress(NotImplementedError):
        list(decoder_layers())
        raise RuntimeError("a kernel that is not made for AMX has made a layer")
    return cases


def feedforward() -> Iterator[Found]:
    """Layers with terms for some of their rows."""
    for rows, d, f, r, kind in ((1, 32, 64, 3, "silu"), (150, 96, 160, 16, "gelu_tanh"), (290, 64, 128, 40, "gelu")):
        terms = _terms([(f, d), (f, d), (d, f)], r, rows)
        gate, up, down = (_weight(*of) for of in ((f, d), (f, d), (d, f)))
        made = FeedForward((gate, up, down), terms, kind)
        n, dy = (torch.randn(rows, d).bfloat16() for _ in range(2))
        both, y, dn = (torch.full((rows, k), torch.nan).bfloat16() for k in (2 * f, d, d))
        inner = [torch.full((rows - rows // 4, r), torch.nan).bfloat16() for _ in terms]
        half.run_forward(made, n, both, inner, y)
        norm = RmsNorm(torch.randn(d).to(torch.bfloat16 if rows > 200 else torch.float32), 1e-5, rows > 100)
        source = Source(n, norm, rms_norm(n, norm.weight, norm.eps, norm.unit_offset)[1]) if rows > 1 else Source(n)
        for mine, its in zip((both, y, *inner), half.feedforward_reference(made, n), strict=True):
            yield "feed-forward layers", mine.detach().clone(), its.detach(), ROUNDED
        all_da, all_db = half.run_backward(made, dy, both, inner, dn, source)
        its_dn, its_da, its_db = half.feedforward_backward_reference(made, dy, both, inner, source.made())
        for mine, its in zip((dn, *all_da, *all_db), (its_dn, *its_da, *its_db), strict=True):
            yield "their gradients", mine.detach(), its.detach(), ROUNDED


def decoder_layers() -> Iterator[Found]:
    """With biases, a window, and terms for some of their rows, of which all or some go on; the last with norms of
    heads."""
    some = torch.arange(20, BOUNDS[-1], 2)
    for heads, key_heads, r, dtype, positions in (
        (4, 2, 3, torch.float32, None), (3, 3, 40, torch.bfloat16, None), (4, 2, 16, torch.bfloat16, some),
    ):  # fmt: skip
        made = _layer(heads, key_heads, r, dtype, None if positions is None else len(positions))
        if r == 16:
            of_heads = HeadNorm(torch.randn(16).to(dtype), 1e-5, True), HeadNorm(torch.randn(16), 1e-6, False)
            made = replace(made, attention=replace(made.attention, norms=of_heads))
        rotary = torch.randn(BOUNDS[-1], 16), torch.randn(BOUNDS[-1], 16)
        x = torch.randn(1, BOUNDS[-1], made.hidden)
        leaf = x.clone().requires_grad_()
        y = whole.in_single_steps(made, leaf, rotary, BOUNDS, positions)
        dy = torch.randn_like(y)
        masters = [*(term.a for term, _ in made.terms), *(term.b for term, _ in made.terms)]
        expected = [y.detach(), *torch.autograd.grad(y, (leaf, *masters), dy)]
        with torch.no_grad():
            attention = _Attention(made.attention.rule)
            stream = stream_of(x, positions)
            kept = whole.run_forward(made, stream, rotary, BOUNDS, attention.addresses)
            back = gradient_of(dy, BOUNDS[-1], positions)
            learned = whole.run_backward(made, back, kept, rotary, BOUNDS, attention.addresses)
        for mine, its in zip([stream.behind, back.before, *chain(*learned)], expected, strict=True):
            yield "decoder layers", mine, its, OFTEN


def _layer(heads: int, key_heads: int, r: int, dtype: torch.dtype, on: int | None) -> DecoderLayer:
    """Norms and biases are of `dtype`; `on`: so many rows go on, where these are not all."""
    d, f, own, others = 96, 64, 16 * heads, 16 * key_heads
    sizes = [(f, d), (f, d), (d, f), (own, d), (others, d), (others, d), (d, own)]
    norms = RmsNorm(torch.randn(d).to(dtype), 1e-5), RmsNorm(torch.randn(d).to(dtype), 1e-6, True)
    early, late = (_terms(sizes, r, rows) for rows in (BOUNDS[-1], on or BOUNDS[-1]))
    return DecoderLayer(
        tuple(_weight(*of) for of in sizes), tuple(torch.randn(n).to(dtype) for n, _ in sizes),
        tuple(own if own.part in whole.INPUTS else behind for own, behind in zip(early, late)),
        SelfAttention(Heads(heads, key_heads, 16), AttentionRule(0.05, 23)), norms, "silu", 0.7,
    )  # fmt: skip


def _weight(outputs: int, inputs: int) -> Tensor:
    return (torch.randn(outputs, inputs) / inputs**0.5).bfloat16()


def _terms(sizes: list[tuple[int, int]], r: int, rows: int) -> tuple[Placed, ...]:
    """One of each layer of (outputs, inputs), for its later rows; some ranks have dropout."""
    seeds = token_seeds(torch.full((rows,), r), torch.arange(rows))[rows // 4 :]
    return tuple(
        Placed(
            LowRank(
                rows // 4, rows, (torch.randn(r, k) / k**0.5).requires_grad_(),
                (torch.randn(n, r) / 8).requires_grad_(), 0.5, Dropout(0.1, part, seeds) if r == 16 else None,
            ), part,
        )
        for part, (n, k) in enumerate(sizes)
    )  # fmt: skip


class _Attention:
    """Plain torch's as attention.c's functions; these last as long as this does."""

    def __init__(self, rule: AttentionRule) -> None:
        self._rule = rule
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, *[ctypes.c_void_p] * 3)
        self._functions = kind(self._forward), kind(self._backward)
        forward, backward = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in self._functions)
        self.addresses = forward, backward

    def _forward(self, *given: Any) -> int:
        query, key, value, out = _views(4, *given)
        out.copy_(forward_reference(query, key, value, BOUNDS, self._rule))
        return 0

    def _backward(self, *given: Any) -> int:
        query, key, value, out, grad, *into = _views(8, *given)
        backward_reference(grad, query, key, value, out, BOUNDS, self._rule, None, (into[0], into[1], into[2]))
        return 0


def _views(count: int, shape: int, _: int, __: float, strides: int, tensors: int, ___: int) -> list[Tensor]:
    """query, key, value and out, and backward the gradients of out and of the three, from attention.c's tables."""
    tokens, heads, key_heads, size = (ctypes.c_int64 * 5).from_address(shape)[1:]
    steps, at = (ctypes.c_int64 * (2 * count)).from_address(strides), (ctypes.c_void_p * count).from_address(tensors)
    found = []
    for number, n in enumerate((heads, key_heads, key_heads, heads, heads, heads, key_heads, key_heads)[:count]):
        by_token, by_head = steps[2 * number : 2 * number + 2]
        room = (ctypes.c_char * (2 * (tokens * by_token))).from_address(at[number] or 0)
        flat = torch.frombuffer(room, dtype=torch.bfloat16, count=(tokens - 1) * by_token + (n - 1) * by_head + size)
        found.append(flat.as_strided((tokens, n, size), (by_token, by_head, 1)))
    return found
