"""The pass over the logits, and its gradient in the same memory, against log_softmax in float64."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from reference.measure import relative
from topwork.ops import logprobs
from topwork.ops.logprobs import logprob_slope_, logprob_slope_reference
from topwork.ops.native import build, load
from topwork.ops.native.variants import processor

VOCABULARIES = (1, 2, 15, 16, 17, 31, 32, 33, 64, 1000, 2048, 2049, 49152 + 3)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def truth(logits: Tensor, targets: Tensor, gradient: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """By autograd, in float64."""
    wide = logits.double().requires_grad_()
    logps = torch.log_softmax(wide * scale, -1)[torch.arange(len(targets)), targets]
    (slope,) = torch.autograd.grad((logps * gradient.double()).sum(), wide)
    return logps.detach(), slope


def inputs(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    logits = (torch.randn(rows, vocabulary) * 3).to(dtype)
    return logits, torch.randint(0, vocabulary, (rows,)), torch.randn(rows)


def assert_true(logits: Tensor, targets: Tensor, gradient: Tensor, scale: float = 1.0) -> None:
    logps, slope = truth(logits, targets, gradient, scale)
    given = logits.clone()
    found = logprob_slope_(given, targets, gradient, scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), logps, rtol=1e-6, atol=1e-6)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[logits.dtype]
    rounding += 1e-7 * float((logits * scale).abs().nan_to_num(posinf=0).max())  # of z, before its exponential is taken
    torch.testing.assert_close(given.double(), slope, rtol=rounding, atol=3e-7)


@pytest.fixture
def native_needed() -> None:
    if load.compiled("logprobs") is None:
        pytest.skip("no C compiler, so there is no kernel to compare with the truth")


@DTYPES
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_values_and_slopes(vocabulary: int, dtype: torch.dtype) -> None:
    for rows in (1, 3):
        assert_true(*inputs(rows, vocabulary, dtype))


@DTYPES
def test_every_target(dtype: torch.dtype) -> None:
    """First, last, and every lane between."""
    logits, _, _ = inputs(67, 67, dtype)
    assert_true(logits, torch.arange(67), torch.ones(67))


@DTYPES
@pytest.mark.parametrize("scale", [0.125, 7.0, -2.0])
def test_a_scale(scale: float, dtype: torch.dtype) -> None:
    assert_true(*inputs(5, 77, dtype), scale)


def test_float16_goes_to_the_truth() -> None:
    assert_true(*inputs(5, 77, torch.float16))


@DTYPES
def test_the_truth_is_true(dtype: torch.dtype) -> None:
    for scale in (1.0, 0.3):
        given = inputs(4, 333, dtype)
        for found, expected in zip(logprob_slope_reference(*given, scale), truth(*given, scale)):
            assert relative(found, expected) < (2e-6 if found.dtype == torch.float32 else 4e-3)


@DTYPES
def test_extreme_logits(dtype: torch.dtype) -> None:
    logits, targets, gradient = inputs(6, 200, dtype)
    logits[0] *= 1e4
    logits[1] = -1e4
    logits[2] = 1e4
    logits[3, 7] = 1e4
    logits[4] = 0
    logits[5, 1::2] = -torch.inf
    targets[3], targets[5] = 7, 2
    assert_true(logits, targets, gradient)


@DTYPES
@pytest.mark.parametrize("at", [0, 20, 40, 60, 64, 66])
def test_the_largest_may_stand_anywhere(at: int, dtype: torch.dtype) -> None:
    """Nothing overflows: 0 of it and of what vectors leave over is left out."""
    logits = torch.zeros(2, 67, dtype=dtype)
    logits[:, at] = 1000
    given = logits.clone()
    found = logprob_slope_(given, torch.tensor([at, (at + 1) % 67]), torch.ones(2))
    assert found.tolist() == [0, -1000]
    assert given.isfinite().all()


@DTYPES
def test_an_impossible_target_has_probability_zero(dtype: torch.dtype) -> None:
    logits, targets, gradient = inputs(2, 40, dtype)
    logits[0, 3] = -torch.inf
    targets[0] = 3
    _, slope = truth(logits, targets, gradient)
    assert logprob_slope_(logits, targets, gradient)[0] == -torch.inf
    assert relative(logits, slope) < 4e-3


@DTYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, "all -inf"])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_row_that_is_no_distribution_is_not_a_number(bad: float | str, weight: float, dtype: torch.dtype) -> None:
    """In a vector and in what is left after the last whole one; the rows beside it stay as they are."""
    for place in (0, 39):
        logits, targets, gradient = inputs(3, 40, dtype)
        logits[1] = -torch.inf if bad == "all -inf" else logits[1]
        logits[1, place] = logits[1, place] if bad == "all -inf" else bad
        gradient[1] = weight
        targets[1] = 20
        expected, slope = truth(logits[::2], targets[::2], gradient[::2])
        found = logprob_slope_(logits, targets, gradient)
        assert not found[1].isfinite()
        assert logits[1].isnan().all()
        assert relative(found[::2], expected) < 1e-6
        assert relative(logits[::2], slope) < 4e-3


@DTYPES
def test_rows_that_weigh_nothing(dtype: torch.dtype) -> None:
    logits, targets, gradient = inputs(4, 99, dtype)
    gradient[1:3] = 0
    assert_true(logits, targets, gradient)
    logprob_slope_(logits, targets, gradient)
    assert torch.count_nonzero(logits[1:3]) == 0


@DTYPES
def test_a_large_vocabulary_costs_no_accuracy(dtype: torch.dtype) -> None:
    logits, targets = torch.full((1, 1 << 20), 0.3).to(dtype), torch.tensor([5])
    found = logprob_slope_(logits, targets, torch.ones(1))
    assert abs(float(found) + 20 * torch.tensor(2.0).log().item()) < 1e-6


@DTYPES
@pytest.mark.usefixtures("native_needed")
def test_rows_apart_in_memory(dtype: torch.dtype) -> None:
    """A view of a wider buffer: its other values are left alone, and the kernel takes it."""
    logits, targets, gradient = inputs(5, 50, dtype)
    buffer = torch.full((7, 64), 9.0).to(dtype)
    view = buffer[1:6, 3:53]
    view.copy_(logits)
    assert logprobs._plain(view, targets, gradient, 1.0)
    logps, slope = truth(logits, targets, gradient)
    assert relative(logprob_slope_(view, targets, gradient), logps) < 1e-6
    assert relative(view, slope) < 4e-3
    buffer[1:6, 3:53] = 9
    assert (buffer == 9).all()


@DTYPES
def test_what_the_kernel_cannot_read_goes_to_the_truth(dtype: torch.dtype) -> None:
    logits, targets, gradient = inputs(5, 50, dtype)
    logps, slope = truth(logits, targets, gradient)
    turned = logits.t().contiguous().t()
    spread = torch.stack([targets, targets], 1)[:, 0]
    assert not logprobs._plain(turned, targets, gradient, 1.0)
    assert not logprobs._plain(logits, spread, gradient, 1.0)
    assert not logprobs._plain(logits, targets, gradient.double(), 1.0)
    assert relative(logprob_slope_(turned, targets, gradient), logps) < 1e-6
    assert relative(turned, slope) < 4e-3
    assert relative(logprob_slope_(logits, spread, gradient), logps) < 1e-6


@pytest.mark.usefixtures("native_needed")
def test_the_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: object) -> None:
        raise AssertionError("the truth was asked")

    monkeypatch.setattr(logprobs, "logprob_slope_reference", never)
    logprob_slope_(*inputs(3, 50, torch.bfloat16))
    with pytest.raises(AssertionError, match="the truth was asked"):
        logprob_slope_(*inputs(3, 50, torch.float16))


def test_without_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "compiled", lambda _: None)
    assert_true(*inputs(3, 50, torch.bfloat16))


@DTYPES
@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3"])
@pytest.mark.usefixtures("native_needed")
def test_narrower_vectors(march: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other processors get: four lanes, and eight."""
    if "avx2" not in processor().decode():
        pytest.skip("these are x86 processors' vectors")
    monkeypatch.setenv(build.MARCH, march)
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path))
    library = load.compiled.__wrapped__("logprobs")
    monkeypatch.setattr(load, "compiled", lambda _: library)
    for vocabulary in (1, 7, 33, 2049):
        assert_true(*inputs(3, vocabulary, dtype))


@DTYPES
def test_any_number_of_threads_gives_the_same_bytes(dtype: torch.dtype) -> None:
    logits, targets, gradient = inputs(37, 130, dtype)
    results = []
    for threads in (1, 2, 3):
        given = logits.clone()
        torch.set_num_threads(threads)
        try:
            results.append((logprob_slope_(given, targets, gradient), given))
        finally:
            torch.set_num_threads(1)
    for found in results[1:]:
        assert torch.equal(found[0], results[0][0])
        assert torch.equal(found[1], results[0][1])


@pytest.mark.parametrize("wrong", [-1, 50, -100])
def test_targets_beyond_the_vocabulary_are_refused(wrong: int) -> None:
    logits, targets, gradient = inputs(3, 50, torch.bfloat16)
    before = logits.clone()
    targets[1] = wrong
    with pytest.raises(IndexError, match="in a vocabulary of 50"):
        logprob_slope_(logits, targets, gradient)
    assert torch.equal(logits, before)


def test_lengths_that_differ_are_refused() -> None:
    logits, targets, gradient = inputs(3, 50, torch.bfloat16)
    with pytest.raises(ValueError, match="3 rows of logits"):
        logprob_slope_(logits, targets[1:], gradient)
    with pytest.raises(ValueError, match="3 rows of logits"):
        logprob_slope_(logits, targets, gradient[1:])


def test_no_rows() -> None:
    assert logprob_slope_(*inputs(0, 50, torch.bfloat16)).shape == (0,)
