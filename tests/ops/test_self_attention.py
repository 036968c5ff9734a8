"""Norm of heads, rotary positions and attention as one step: against autograd of the plain formula in fp64."""

import pytest
import torch
from torch import Tensor

from reference.attention import attention_by_sequence
from reference.kept import kept_by
from reference.measure import apart, relative
from topwork.ops.attention_reference import AttentionRule
from topwork.ops.self_attention import HeadNorm, Heads, SelfAttention, rotated_parts, self_attention

BOUNDS = (0, 7, 7, 8, 20)
HEADS = Heads(6, 2, 16)
T = BOUNDS[-1]


def how(norms: str = "none", window: int | None = None, softcap: float | None = None) -> SelfAttention:
    generator = torch.Generator().manual_seed(0)

    def norm(heads: int) -> HeadNorm:
        size = HEADS.size * (heads if norms == "whole" else 1)
        return HeadNorm(1 + 0.3 * torch.randn(size, generator=generator), 1e-5, norms == "offset")

    pair = None if norms == "none" else (norm(HEADS.queries), norm(HEADS.keys))
    return SelfAttention(HEADS, AttentionRule(0.3, window, softcap), pair)


def turns(width: int) -> tuple[Tensor, Tensor] | None:
    """cos and sin as transformers makes them; width 0 for none."""
    if not width:
        return None
    positions = torch.cat([torch.arange(stop - start) for start, stop in zip(BOUNDS, BOUNDS[1:])])
    angles = positions[:, None] / 10 ** torch.linspace(0, 2, width // 2)
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def truth(buffer: Tensor, rotary: tuple[Tensor, Tensor] | None, rule: SelfAttention) -> Tensor:
    parts = list(buffer.unflatten(-1, (-1, HEADS.size)).split([HEADS.queries, HEADS.keys, HEADS.keys], 1))
    for at in (0, 1):
        x = parts[at]
        if rule.norms is not None:
            norm = rule.norms[at]
            rows = x if norm.weight.numel() == HEADS.size else x.flatten(1)
            rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + norm.eps)
            x = (rows * (norm.weight.double() + norm.unit_offset)).view(x.shape)
        if rotary is not None:
            cos, sin = (table.double()[:, None] for table in rotary)
            turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
            half = turned.shape[-1] // 2
            other = torch.cat([-turned[..., half:], turned[..., :half]], -1)
            x = torch.cat([turned * cos + other * sin, rest], -1)
        parts[at] = x
    out = attention_by_sequence(*parts, BOUNDS, rule.rule.scale, rule.rule.window, rule.rule.softcap, rule.sinks)
    return out.flatten(1)


@pytest.mark.parametrize("norms", ["none", "each", "offset", "whole"])
@pytest.mark.parametrize("width", [0, 8, 16], ids=["no rotary", "half of a head", "whole heads"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 0.5)], ids=str)
def test_values_and_gradients(norms: str, width: int, window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    rule, rotary = how(norms, window, softcap), turns(width)
    buffer, grad = torch.randn(T, HEADS.width), torch.randn(T, HEADS.queries * HEADS.size)
    exact = buffer.double().requires_grad_()
    expected = truth(exact, rotary, rule)
    expected.backward(grad.double())
    leaf = buffer.clone().requires_grad_()
    found = self_attention(leaf * 1, rotary, BOUNDS, rule)
    found.backward(grad)
    assert exact.grad is not None
    assert leaf.grad is not None
    assert relative(found, expected) < apart(2, HEADS.width)
    assert relative(leaf.grad, exact.grad) < apart(6, HEADS.width)


@pytest.mark.parametrize("norms", ["none", "whole"])
def test_the_parts_for_a_cache_are_those_that_attend(norms: str) -> None:
    rule, rotary = how(norms), turns(16)
    buffer = torch.randn(T, HEADS.width)
    q, k, v = rotated_parts(buffer.clone(), rotary, rule)
    assert torch.equal(v.flatten(1), buffer[:, -HEADS.keys * HEADS.size :])
    out = attention_by_sequence(q.double(), k.double(), v.double(), BOUNDS, rule.rule.scale, None, None, None)
    assert relative(self_attention(buffer.clone(), rotary, BOUNDS, rule), out.flatten(1)) < 2e-6


def test_only_the_buffer_and_a_number_for_each_head_are_kept() -> None:
    leaf = torch.randn(T, HEADS.width).requires_grad_()
    buffer = leaf * 1
    kept = kept_by(lambda: self_attention(buffer, turns(16), BOUNDS, how()), [leaf, buffer])
    assert kept <= 4 * T * HEADS.queries
