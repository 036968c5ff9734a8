"""attention_forward and attention_backward: the C kernel against attention one head at a time in float64."""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reference.attention import attention_by_sequence
from reference.compiler import FEATURES, OlderBuild, build_kernel, needs_compiler, usual_kernels
from reference.measure import relative
from topwork.ops import attention
from topwork.ops.attention import attention_backward, attention_forward
from topwork.ops.attention_reference import AttentionRule
from topwork.ops.native import build, load

pytestmark = needs_compiler

TYPES = [torch.float32, torch.bfloat16]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3 * 2**-8}
"""In bf16 the probabilities, their gradients and the result are rounded, by 2^-8 at most, which few keys come near."""
BOUNDS = [
    (0, 1),
    (0, 1, 2, 4, 7),  # fewer tokens than a tile has rows
    (0, 0, 5, 5, 38, 39, 39),  # sequences without tokens
    (0, 97, 145, 273),  # odd lengths across blocks of 48 and 96 rows
    (0, 15, 31, 63, 128, 193),  # one below and one above the vectors and panels
    (0, 1, 16, 16, 32, 49, 80, 113),  # around a tile's 16 rows, and around the 32 values of its summed axis
]

NAN_MEMORY = """
#include <stdlib.h>
#include <string.h>
static void *nan_memory(size_t to, size_t bytes) {
  void *at = aligned_alloc(to, bytes);
  return at ? memset(at, 0xff, bytes) : at;
}
#define aligned_alloc nan_memory
"""

Case = tuple[Tensor, Tensor, Tensor, Tensor]


def case(tokens: int, heads: int, key_heads: int, size: int, dtype: torch.dtype) -> Case:
    """grad, query, key, value."""
    grad, query, key, value = (torch.randn(tokens, n, size).to(dtype) for n in (heads, heads, key_heads, key_heads))
    return grad, query, key, value


def both(case: Case, bounds: tuple[int, ...], rule: AttentionRule) -> list[Tensor]:
    """Output and gradients of query, key and value."""
    grad, *inputs = case
    out, lse = attention_forward(*inputs, bounds, rule)
    return [out, *attention_backward(grad, *inputs, out, lse, bounds, rule)[:3]]


def truth(case: Case, bounds: tuple[int, ...], rule: AttentionRule) -> list[Tensor]:
    grad, *inputs = (x.double().requires_grad_() for x in case)
    out = attention_by_sequence(*inputs, bounds, **asdict(rule))
    return [out.detach(), *torch.autograd.grad((out * grad.detach()).sum(), inputs)]


def assert_near(found: list[Tensor], expected: list[Tensor], limit: float) -> None:
    least = 0.2 * float(torch.stack([x.norm() for x in expected]).norm())  # queries of one key have no gradient
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs, least) < limit
        if theirs.norm() > least:
            assert torch.cosine_similarity(ours.double().flatten(), theirs.flatten(), 0) > 0.9999


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", [(9, 3, 64), (2, 2, 16), (2, 1, 48), (4, 1, 80), (2, 1, 256)], ids=str)
def test_values_and_gradients(shape: tuple[int, int, int], bounds: tuple[int, ...], dtype: torch.dtype) -> None:
    heads, key_heads, size = shape
    given = case(bounds[-1], heads, key_heads, size, dtype)
    for window in (None, 1, 7, 70, 1000):
        rule = AttentionRule(size**-0.5, window)
        assert attention._native(*given[1:], rule, None) is not None
        assert_near(both(given, bounds, rule), truth(given, bounds, rule), LIMITS[dtype])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("key_heads", [1, 3], ids=["keys of one head", "as many as query heads"])
@pytest.mark.parametrize("window", [None, 40, 300])
def test_long_sequences(window: int | None, key_heads: int, dtype: torch.dtype) -> None:
    """Longer than a block of keys, and cut by query heads where these share a key head."""
    bounds = (0, 530, 540)
    given = case(540, 3, key_heads, 32, dtype)
    rule = AttentionRule(0.2, window)
    assert_near(both(given, bounds, rule), truth(given, bounds, rule), LIMITS[dtype])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_lse_is_the_logarithm_of_the_denominator(dtype: torch.dtype) -> None:
    _, query, key, value = case(50, 4, 2, 32, dtype)
    out, lse = attention_forward(query, key, value, (0, 50), AttentionRule(0.3))
    scores = torch.einsum("ihd,jhd->hij", query.double(), key.double().repeat_interleave(2, 1)) * 0.3
    expected = scores.masked_fill(torch.ones(50, 50).triu(1).bool(), -torch.inf).logsumexp(-1)
    assert lse is not None
    assert lse.shape == (4, 50)
    assert relative(lse, expected) < 1e-6
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_slices_of_one_buffer_in_and_out(dtype: torch.dtype) -> None:
    """Query, key and value side by side in rows of one buffer; the gradients go into another, or over the inputs."""
    bounds, rule = (0, 70, 75, 640), AttentionRule(0.2)
    sizes = (4 * 32, 2 * 32, 2 * 32)
    buffer = torch.randn(640, sum(sizes) + 8).to(dtype)
    views = [x.unflatten(1, (-1, 32)) for x in buffer[:, 8:].split(sizes, 1)]
    wide = torch.randn(640, 4, 64).to(dtype)
    given = (wide[..., 32:], *views)
    expected = both(tuple(x.contiguous() for x in given), bounds, rule)
    out, lse = attention_forward(*views, bounds, rule)
    other = torch.full_like(buffer, 7)
    for target in (other, buffer):
        into = tuple(x.unflatten(1, (-1, 32)) for x in target[:, 8:].split(sizes, 1))
        before = target[:, :8].clone()
        found = attention_backward(given[0], *views, out, lse, bounds, rule, into=into)
        assert found[:3] == into
        assert found[3] is None
        assert torch.equal(target[:, :8], before)
        for ours, theirs in zip((out, *into), expected):
            assert torch.equal(ours, theirs)


def amid_nan(tokens: int, heads: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A buffer of NaN, and rows in the midst of it: there are some before, between and behind them."""
    buffer = torch.full((tokens + 50, heads * size + 21), torch.nan, dtype=dtype)
    return buffer, buffer[9 : 9 + tokens, 5 : 5 + heads * size].unflatten(1, (heads, size))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", [16, 48, 64, 80])
@pytest.mark.parametrize("flags", ["", "-DEMULATE_AMX", "-DNO_AMX"])
def test_what_lies_beside_reaches_no_result(
    flags: str, size: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN around the tensors, and NaN in the memory that the kernel takes: where it multiplies more than it was given,
    there must be zeros."""
    (tmp_path / "nan.h").write_text(NAN_MEMORY)
    library = build_kernel("attention", f"{flags} -include {tmp_path / 'nan.h'}", tmp_path)
    monkeypatch.setattr(load, "compiled", lambda _: library)
    bounds, rule = (0, 1, 16, 16, 32, 49, 80, 113, 413), AttentionRule(0.2, 70 if size == 64 else None)
    given = case(413, 4, 2, size, dtype)
    views = [amid_nan(413, x.shape[1], size, dtype)[1].copy_(x) for x in given]
    out, lse = attention_forward(*views[1:], bounds, rule)
    targets = [amid_nan(413, x.shape[1], size, dtype) for x in given[1:]]
    query, key, value = (x for _, x in targets)
    attention_backward(views[0], *views[1:], out, lse, bounds, rule, into=(query, key, value))
    assert_near([out, query, key, value], truth(given, bounds, rule), LIMITS[dtype])
    for buffer, rows in targets:
        assert buffer.isfinite().sum() == rows.numel()


def test_rows_that_are_not_contiguous_and_targets_of_another_type() -> None:
    given = case(40, 4, 2, 32, torch.bfloat16)
    expected = both(given, (0, 40), AttentionRule(0.2))
    turned = tuple(x.transpose(0, 2).contiguous().transpose(0, 2) for x in given)
    assert all(x.stride(-1) != 1 for x in turned)
    out, lse = attention_forward(*turned[1:], (0, 40), AttentionRule(0.2))
    into = tuple(torch.empty(x.shape) for x in given[1:])
    attention_backward(turned[0], *turned[1:], out, lse, (0, 40), AttentionRule(0.2), into=into)
    for ours, theirs in zip((out, *into), expected):
        assert torch.equal(ours.bfloat16(), theirs)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_neighbours_and_threads_change_no_bit(window: int | None, dtype: torch.dtype) -> None:
    bounds = (0, 33, 34, 700, 700, 733)
    given = case(733, 6, 2, 32, dtype)
    rule = AttentionRule(0.2, window)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(both(given, bounds, rule))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))
    for start, stop in zip(bounds, bounds[1:]):
        alone = both(tuple(x[start:stop] for x in given), (0, stop - start), rule)
        assert all(torch.equal(a, b[start:stop]) for a, b in zip(alone, results[0]))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sequence(bad: float, dtype: torch.dtype) -> None:
    bounds = (0, 21, 54, 75)
    given = case(75, 4, 2, 32, dtype)
    clean = both(given, bounds, AttentionRule(0.2))
    for x in given:
        x[21:54] = bad
    for ours, theirs in zip(both(given, bounds, AttentionRule(0.2)), clean):
        assert torch.equal(ours[:21], theirs[:21])
        assert torch.equal(ours[54:], theirs[54:])
        assert ours[21:54].isnan().any()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_nan_in_a_query_reaches_its_own_output(dtype: torch.dtype) -> None:
    given = case(40, 2, 2, 32, dtype)
    given[1][17, 1, 3] = torch.nan
    out = both(given, (0, 40), AttentionRule(0.2))[0].isnan()
    assert out[17, 1].all()
    assert out.sum() == 32


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    """Scores in the thousands, of either sign: one key takes nearly all."""
    given = case(600, 2, 1, 32, dtype)
    given[1].mul_(100)
    given[2].mul_(20)
    found = both(given, (0, 600), AttentionRule(1.0))
    query, key, value = (x.double().transpose(0, 1).requires_grad_() for x in given[1:])
    scores = (query @ key.transpose(1, 2)).masked_fill(torch.ones(600, 600).triu(1).bool(), -torch.inf)
    assert scores[:, -1].abs().max() > 1000
    out = (scores.softmax(-1) @ value).transpose(0, 1)
    expected = torch.autograd.grad((out * given[0]).sum(), value)[0].transpose(0, 1)
    assert all(x.isfinite().all() for x in found)
    limit = max(2e-3, LIMITS[dtype])  # scores of 10^4 are known to 10^-3 in fp32, and so are their exponentials
    assert relative(found[0], out) < limit
    assert relative(found[3], expected) < limit


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_scores_of_minus_infinity_are_no_share(dtype: torch.dtype) -> None:
    _, query, key, value = case(20, 1, 1, 16, dtype)
    query.fill_(1)
    key[5] = -torch.inf
    out, _ = attention_forward(query, key, value, (0, 20), AttentionRule(0.2))
    rest = [i for i in range(20) if i != 5]
    kept, _ = attention_forward(*(x[rest] for x in (query, key, value)), (0, 19), AttentionRule(0.2))
    assert relative(out[rest], kept) < LIMITS[dtype]


def test_a_stream_without_tokens() -> None:
    given = case(0, 4, 2, 32, torch.float32)
    assert [x.shape for x in both(given, (0, 0), AttentionRule(0.2))] == [
        (0, 4, 32),
        (0, 4, 32),
        (0, 2, 32),
        (0, 2, 32),
    ]


@pytest.mark.parametrize(
    "change", ["fp16", "size of 24", "size of 272", "softcap", "sinks", "other type of value"]
)  # fmt: skip
def test_what_the_kernel_does_not_know_runs_on_plain_torch(change: str) -> None:
    size = {"size of 24": 24, "size of 272": 272}.get(change, 32)
    grad, query, key, value = case(30, 4, 2, size, torch.float16 if change == "fp16" else torch.float32)
    rule = AttentionRule(0.2, softcap=5.0 if change == "softcap" else None)
    sinks = torch.randn(4) if change == "sinks" else None
    if change == "other type of value":
        assert attention._native(query, key, value.bfloat16(), rule, sinks) is None
        return
    assert attention._native(query, key, value, rule, sinks) is None
    out, lse = attention_forward(query, key, value, (0, 30), rule, sinks)
    assert lse is None
    into = tuple(torch.empty_like(x) for x in (query, key, value))
    found = attention_backward(grad, query, key, value, out, lse, (0, 30), rule, sinks, into)
    inputs = [x.double().requires_grad_() for x in (query, key, value)]
    expected = attention_by_sequence(*inputs, (0, 30), **asdict(rule), sinks=sinks)
    grads = torch.autograd.grad((expected * grad.double()).sum(), inputs, materialize_grads=True, allow_unused=True)
    assert (found[3] is None) == (sinks is None)
    assert_near([out, *into], [expected.detach(), *grads], 5e-3 if change == "fp16" else 1e-5)


def test_wrong_shapes_are_refused() -> None:
    grad, query, key, value = case(30, 4, 2, 32, torch.float32)
    rule = AttentionRule(0.2)
    out, lse = attention_forward(query, key, value, (0, 30), rule)
    with pytest.raises(ValueError, match="do not fit"):
        attention_forward(query, key[:20], value, (0, 30), rule)
    with pytest.raises(ValueError, match="do not fit"):
        attention_forward(query, key[..., :16], value, (0, 30), rule)
    with pytest.raises(ValueError, match="are expected"):
        attention_backward(grad[:20], query, key, value, out, lse, (0, 30), rule)
    with pytest.raises(ValueError, match="are expected"):
        attention_backward(grad, query, key, value, out, lse, (0, 30), rule, into=(query, key[:, :1], value))
    with pytest.raises(ValueError, match="attention_forward gave"):
        attention_backward(grad, query, key, value, out, out[..., 0], (0, 30), rule)


@usual_kernels
def test_the_kernel_is_used_and_made_for_this_processor() -> None:
    """Without this, a kernel that no longer compiles or is never called would pass as plain torch."""
    library = load.compiled("attention")
    assert library is not None
    expected = 3 if "amx_bf16" in FEATURES else 2 if "avx512_bf16" in FEATURES else 1
    assert library.topwork_attention_level() == expected
    _, query, key, value = case(30, 4, 2, 32, torch.bfloat16)
    assert attention_forward(query, key, value, (0, 30), AttentionRule(0.2))[1] is not None


def test_older_processors(older_build: OlderBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same source with fewer instructions: bf16 without its own product, narrower vectors."""
    library, level = older_build("attention")
    assert library.topwork_attention_level() == level
    monkeypatch.setattr(load, "compiled", lambda _: library)
    for dtype in TYPES:
        for bounds, window in (((0, 97, 98, 130), None), ((0, 530), 70)):
            given = case(bounds[-1], 4, 2, 48, dtype)
            rule = AttentionRule(0.2, window)
            assert_near(both(given, bounds, rule), truth(given, bounds, rule), LIMITS[dtype])


def test_without_a_compiler_everything_still_runs() -> None:
    code = (
        "import torch; from topwork.ops.attention import *; q = torch.ones(5, 2, 16);"
        "out, lse = attention_forward(q, q, q, (0, 5), AttentionRule(1.0));"
        "assert lse is None and bool((out == 1).all());"
        "assert attention_backward(q, q, q, q, out, lse, (0, 5), AttentionRule(1.0))[0].shape == q.shape"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, build.OFF: "1"})
