"""flat_attention and attend against attention one sequence and one head at a time, in float64."""

from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from reference.attention import attention_by_sequence
from reference.measure import relative
from topwork.ops import attention_reference
from topwork.ops.attention import flat_attention
from topwork.ops.attention_reference import AttentionRule, attend, attend_by_rows

RAGGED = (0, 7, 8, 27, 31, 50, 68, 69)
"""Sequences of 7, 1, 19, 4, 19, 18 and 1 tokens: groups with and without padded tails, and one alone."""


def batch(
    bounds: tuple[int, ...], heads: int = 4, key_heads: int = 2, size: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(bounds[-1], n, size).to(dtype) for n in (heads, key_heads, key_heads))
    return query, key, value


def gradients(out: Tensor, inputs: list[Tensor], slope: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * slope.to(out.dtype)).sum(), inputs)


def compare(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], rule: AttentionRule,
    sinks: Tensor | None = None, tolerance: float = 2e-6,
) -> None:  # fmt: skip
    inputs = [x.detach().requires_grad_() for x in (query, key, value, sinks) if x is not None]
    truths = [x.detach().double().requires_grad_() for x in inputs]
    out = flat_attention(*inputs[:3], bounds, rule, *inputs[3:])
    truth = attention_by_sequence(*truths[:3], bounds, **asdict(rule), sinks=truths[3] if sinks is not None else None)
    assert out.shape == truth.shape
    assert out.dtype == query.dtype
    assert relative(out, truth) < tolerance
    slope = torch.randn(truth.shape, dtype=torch.float64)
    found, expected = gradients(out, inputs, slope), gradients(truth, truths, slope)
    least = 0.2 * float(torch.stack([x.norm() for x in expected]).norm())  # queries of one key have no gradient
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == query.dtype
        assert relative(ours, theirs, least) < 2 * tolerance


RULES = {
    "plain": (AttentionRule(0.3), False),
    "window": (AttentionRule(0.3, window=5), False),
    "window of one": (AttentionRule(0.3, window=1), False),
    "window longer than all": (AttentionRule(0.3, window=100), False),
    "softcap": (AttentionRule(0.9, softcap=0.7), False),
    "softcap and window": (AttentionRule(0.9, window=6, softcap=0.7), False),
    "sinks": (AttentionRule(0.3), True),
    "sinks, softcap and window": (AttentionRule(0.3, window=4, softcap=1.5), True),
}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["all heads", "grouped", "one key head"])
@pytest.mark.parametrize("name", RULES)
def test_values_and_gradients(name: str, heads: tuple[int, int]) -> None:
    rule, with_sinks = RULES[name]
    sinks = torch.randn(heads[0]) if with_sinks else None
    compare(*batch(RAGGED, *heads), RAGGED, rule, sinks)


@pytest.mark.parametrize("bounds", [(0, 1), (0, 1, 2, 3), (0, 13), (0, 9, 18, 27), (0, 3, 3, 8)], ids=str)
@pytest.mark.parametrize("size", [1, 5, 24])
def test_odd_shapes(bounds: tuple[int, ...], size: int) -> None:
    """One token, one sequence, equal sequences, a sequence without tokens; head sizes no kernel is made for."""
    compare(*batch(bounds, 3, 3, size), bounds, AttentionRule(size**-0.5))
    compare(*batch(bounds, 4, 2, size), bounds, AttentionRule(size**-0.5, window=2), torch.randn(4))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scores", [1, 200, 1000])
def test_long_sequences_go_in_blocks(monkeypatch: pytest.MonkeyPatch, name: str, scores: int) -> None:
    monkeypatch.setattr(attention_reference, "SCORES_PER_BLOCK", scores)
    blocks = list(attention_reference._blocks(torch.empty(1, 4, 40, 8), AttentionRule(1.0)))
    assert len(blocks) > 1
    rule, with_sinks = RULES[name]
    bounds = (0, 40, 79, 85)
    compare(*batch(bounds), bounds, rule, torch.randn(4) if with_sinks else None)


@pytest.mark.parametrize("name", RULES)
def test_inputs_need_not_be_contiguous(name: str) -> None:
    """As transformers hands them over: [1, H, T, D] transposed."""
    query, key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in batch(RAGGED))
    assert not query.is_contiguous()
    rule, with_sinks = RULES[name]
    compare(query, key, value, RAGGED, rule, torch.randn(4) if with_sinks else None)


@pytest.mark.parametrize("name", RULES)
def test_bfloat16_within_its_rounding(name: str) -> None:
    """bf16 keeps 8 bits: single values are off by 2^-9, and a few such errors follow one another."""
    rule, with_sinks = RULES[name]
    sinks = torch.randn(4).bfloat16() if with_sinks else None
    compare(*batch(RAGGED, dtype=torch.bfloat16), RAGGED, rule, sinks, tolerance=6e-3)


def test_other_sequences_change_nothing() -> None:
    query, key, value = batch(RAGGED)
    out = flat_attention(query, key, value, RAGGED, AttentionRule(0.3))
    noise = [x.clone() for x in (query, key, value)]
    for x in noise:
        x[:8] = 100.0
        x[27:] = -100.0
    assert torch.equal(flat_attention(*noise, RAGGED, AttentionRule(0.3))[8:27], out[8:27])


def test_sinks_gradient_is_summed_over_groups() -> None:
    sinks = torch.randn(4, requires_grad=True)
    bounds = (0, 30, 33)
    parts = []
    query, key, value = batch(bounds)
    for cut in ((0, 33), (0, 30), (30, 33)):
        at = slice(*cut)
        within = bounds if cut == (0, 33) else (0, cut[1] - cut[0])
        out = flat_attention(query[at], key[at], value[at], within, AttentionRule(0.3), sinks)
        parts.append(torch.autograd.grad(out.square().sum(), sinks)[0])
    assert relative(parts[0], parts[1] + parts[2]) < 1e-6


def test_bounds_that_miss_tokens_are_refused() -> None:
    query, key, value = batch((0, 9))
    for bounds in ((0, 8), (1, 9), (0, 10)):
        with pytest.raises(ValueError, match="do not cover a batch of 9 tokens"):
            flat_attention(query, key, value, bounds, AttentionRule(1.0))
    for bounds in ((0,), (), (0, 5, 3, 9)):
        with pytest.raises(ValueError, match="bounds"):
            flat_attention(query, key, value, bounds, AttentionRule(1.0))


def test_heads_that_do_not_divide_are_refused() -> None:
    query, key, value = batch((0, 9), 4, 3)
    with pytest.raises(ValueError, match="4 query heads are no multiple of 3 key heads"):
        flat_attention(query, key, value, (0, 9), AttentionRule(1.0))


@pytest.mark.parametrize("name", RULES)
def test_one_new_token_over_kept_keys(name: str) -> None:
    """attend's last query equals the last row of whole attention; kept slots beyond a sequence's end are not seen."""
    rule, with_sinks = RULES[name]
    sinks = torch.randn(4) if with_sinks else None
    lengths, capacity = (7, 3), 9
    sequences = [batch((0, length)) for length in lengths]
    key, value = (torch.full((2, 2, capacity, 8), 50.0) for _ in range(2))
    for row, (_, k, v) in enumerate(sequences):
        key[row, :, : len(k)], value[row, :, : len(v)] = k.transpose(0, 1), v.transpose(0, 1)
    last = torch.tensor(lengths)[:, None] - 1
    at = torch.arange(capacity)[None]
    seen = (at <= last) & ((at > last - rule.window) if rule.window is not None else True)
    query = torch.stack([q[-1] for q, _, _ in sequences])[:, :, None]
    out = attend(query, key, value, seen[:, None, None], rule, sinks)[:, :, 0]
    truth = torch.stack([
        attention_by_sequence(q, k, v, (0, len(q)), **asdict(rule), sinks=sinks)[-1] for q, k, v in sequences
    ])  # fmt: skip
    assert relative(out, truth) < 2e-6


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_attend_by_rows_is_attend(key_heads: int) -> None:
    query, key, value = (torch.randn(3, heads, length, 8) for heads, length in ((4, 2), (key_heads, 7), (key_heads, 7)))
    mask = torch.rand(3, 1, 2, 7) < 0.7
    mask[..., 0] = True
    expected = attend(query, key, value, mask, AttentionRule(0.3), None)
    assert relative(attend_by_rows(query, key, value, mask, 0.3), expected) < 1e-6


def test_attend_leaves_cudnn_out_but_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would plan anew for every number of keys."""
    asked, run = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors: Tensor, **options: object) -> Tensor:
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return run(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for device in ("meta", "cpu"):
        query, key = torch.zeros(2, 4, 1, 8, device=device), torch.zeros(2, 2, 5, 8, device=device)
        attend(query, key, key, torch.ones(2, 1, 1, 5, dtype=torch.bool, device=device), AttentionRule(1.0), None)
    assert asked == [False, True]
