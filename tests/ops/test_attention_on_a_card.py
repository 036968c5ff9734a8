"""Attention on a card: every kernel that can is the truth, gives the same bits again, and waits for nothing."""

import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from reference.attention import attention_by_sequence
from reference.measure import relative
from topwork.ops import attention, varlen
from topwork.ops.attention import attention_backward, attention_forward, attention_kernel, flat_attention
from topwork.ops.attention_reference import AttentionRule
from topwork.ops.varlen import Inputs, Kernel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
RAGGED = (0, 7, 8, 27, 31, 50, 68, 69)
PLAIN = AttentionRule(0.125)
OURS = varlen.KERNELS[-1]


def batch(size: int = 64, bounds: tuple[int, ...] = RAGGED) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(bounds[-1], n, size, device="cuda").bfloat16() for n in (4, 2, 2))
    return query, key, value


def views(buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = buffer.unflatten(1, (-1, 64)).split((4, 2, 2), 1)
    return q, k, v


@pytest.mark.parametrize("kernel", varlen.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_kernels_are_the_truth(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, window: int | None, dtype: torch.dtype
) -> None:
    """Grouped heads, ragged rows, views of one buffer, against float64; the same lse from all."""
    bounds, rule = (*RAGGED, 69, 800), AttentionRule(0.125, window)
    buffer, grad = torch.randn(800, 8 * 64, device="cuda").to(dtype), torch.randn(800, 4, 64, device="cuda").to(dtype)
    inputs = Inputs(*views(buffer), bounds, rule, None)
    if (lack := kernel.lacks(inputs)) is not None:
        pytest.skip(lack)
    leaves = [x.cpu().double().requires_grad_() for x in inputs.tensors]
    truth = attention_by_sequence(*leaves, bounds, **asdict(rule))
    expected = torch.autograd.grad((truth * grad.cpu().double()).sum(), leaves)
    monkeypatch.setattr(attention, "chosen", lambda _: kernel)
    out, lse = attention_forward(*inputs.tensors, bounds, rule)
    assert relative(out.cpu(), truth) < 3 * 2**-8
    assert relative(lse, OURS.forward(inputs)[1]) < 1e-4
    into = views(torch.empty_like(buffer))
    attention_backward(grad, *inputs.tensors, out, lse, bounds, rule, into=into)
    for ours, theirs in zip(into, expected):
        assert relative(ours.cpu(), theirs) < 3 * 2**-8


@pytest.mark.parametrize("kernel", varlen.KERNELS, ids=lambda kernel: kernel.name)
def test_going_backward_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    """One long sequence, where many programs would add to a row of the queries' gradient."""
    monkeypatch.setattr(attention, "chosen", lambda _: kernel)
    bounds = (0, 8192, 8200)
    query, key, value = batch(128, bounds)
    if (lack := kernel.lacks(Inputs(query, key, value, bounds, PLAIN, None))) is not None:
        pytest.skip(lack)
    grad = torch.randn_like(query)
    out, lse = attention_forward(query, key, value, bounds, PLAIN)
    first = attention_backward(grad, query, key, value, out, lse, bounds, PLAIN)[:3]
    for _ in range(5):
        again = attention_backward(grad, query, key, value, out, lse, bounds, PLAIN)[:3]
        assert all(torch.equal(x, y) for x, y in zip(first, again))


def test_the_choice_is_made_by_the_card() -> None:
    query, key, value = batch()
    best = attention_kernel(query, key, value, RAGGED, PLAIN)
    assert best in ("flash-attn", "torch")
    assert attention_kernel(query, key, value, RAGGED, PLAIN, torch.zeros(4, device="cuda")) == "triton"
    assert attention_kernel(*(x.float() for x in (query, key, value)), RAGGED, PLAIN) == "triton"


@pytest.mark.parametrize("kernel", varlen.KERNELS, ids=lambda kernel: kernel.name)
def test_no_layer_of_a_pass_waits(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    """Nor the first, which uploads the bounds. (The kernels are loaded before.)"""
    monkeypatch.setattr(attention, "chosen", lambda _: kernel)
    query, key, value = (x.requires_grad_() for x in batch())
    if (lack := kernel.lacks(Inputs(query, key, value, RAGGED, PLAIN, None))) is not None:
        pytest.skip(lack)
    slope = torch.ones_like(query)
    torch.autograd.grad(flat_attention(query, key, value, RAGGED, PLAIN), (query, key, value), slope)
    bounds = (0, 30, 69)  # which nothing has been made for
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(flat_attention(query, key, value, bounds, PLAIN), (query, key, value), slope)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_pass_two_to_the_thirty_first() -> None:
    """The last sequence of a batch whose values lie beyond it, and whose FlashAttention would overflow."""
    tokens, size = math.ceil(2**31 / (64 * 128)) + 300, 128
    bounds = (*range(0, tokens - 300, 4096), tokens - 300, tokens)
    query, grad = (torch.randn(tokens, 64, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    key, value = (torch.randn(tokens, 1, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert attention_kernel(query, key, value, bounds, PLAIN) == "triton"
    out, lse = attention_forward(query, key, value, bounds, PLAIN)
    found = attention_backward(grad, query, key, value, out, lse, bounds, PLAIN)[:3]
    last = [x[-300:].clone() for x in (query, key, value)]
    alone = OURS.forward(Inputs(*last, (0, 300), PLAIN, None))
    into = tuple(torch.empty_like(x) for x in last)
    OURS.backward(Inputs(*last, (0, 300), PLAIN, None), grad[-300:], *alone, into)
    assert torch.equal(out[-300:], alone[0])
    for ours, theirs in zip(found, into):
        assert torch.equal(ours[-300:], theirs)
