"""Gains: value and gradient by the formula in fp64, C and plain torch, on all kinds of views."""

import pytest
import torch
from torch import Tensor

from topwork.ops import gain
from topwork.ops.gain import add_, column_sums, gain_gradients_, input_gain_gradients_, multiply_
from topwork.ops.native import load

SHAPES = [(0, 5), (1, 1), (7, 33), (64, 16), (130, 576), (200, 1030)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias left alone", "no bias"])


def drawn(rows: int, n: int, dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(rows + n)
    z, dy = torch.randn(rows, n).to(dtype), torch.randn(rows, n).to(dtype)
    return z, dy, 0.5 + torch.rand(n), torch.randn(n).to(dtype) if bias else None


def rounding(dtype: torch.dtype) -> float:
    """Of one value, relative to those it was made of."""
    return max(torch.finfo(dtype).eps, 1e-6)


@DTYPES
@BIAS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_formula(layer_backend, shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    z, dy, factor, offset = drawn(*shape, dtype, bias)
    exact = z.double() * factor.double()
    if offset is not None:
        exact -= offset.double() * (factor.double() - 1)
    y = z.clone()
    multiply_(y, factor, offset)
    assert torch.allclose(y.double(), exact, rtol=rounding(dtype), atol=1e-6)

    left_alone = 0 if offset is None else offset.double()
    slope = (dy.double() * (y.double() - left_alone)).sum(0) / factor.double()
    found = gain_gradients_(y, dy, factor, offset)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), slope, rtol=1e-5, atol=1e-4)
    assert torch.equal(y, (dy.float() * factor).to(dtype))


@DTYPES
@BIAS
def test_a_factor_of_one_changes_no_bit(layer_backend, bias: bool, dtype: torch.dtype) -> None:
    z, dy, factor, offset = drawn(70, 33, dtype, bias)
    y = z.clone()
    multiply_(y, torch.ones_like(factor), offset)
    assert torch.equal(y, z)
    gain_gradients_(y, dy, torch.ones_like(factor), offset)
    assert torch.equal(y, dy)


@DTYPES
def test_nothing_beside_a_view_is_written(layer_backend, dtype: torch.dtype) -> None:
    wide, slopes, factor, offset = drawn(9, 50, dtype, bias=True)
    before, view = wide.clone(), wide[2:8, 11:44]
    assert offset is not None
    multiply_(view, factor[11:44], offset[11:44])
    gain_gradients_(view, slopes[2:8, 11:44], factor[11:44], offset[11:44])
    assert torch.equal(view, (slopes[2:8, 11:44].float() * factor[11:44]).to(dtype))
    wide[2:8, 11:44] = before[2:8, 11:44]
    assert torch.equal(wide, before)


@pytest.mark.parametrize("layout", ["turned", "one row for all", "one value for all"])
def test_gradients_laid_out_in_other_ways(layer_backend, layout: str) -> None:
    z, dy, factor, offset = drawn(20, 6, torch.float32, bias=True)
    dy = {"turned": dy.t().contiguous().t(), "one row for all": dy[:1].expand(20, 6),
          "one value for all": dy[:1, :1].expand(20, 6)}[layout]  # fmt: skip
    twin = z.clone()
    found, expected = gain_gradients_(z, dy, factor, offset), gain_gradients_(twin, dy.contiguous(), factor, offset)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(z, twin)


@DTYPES
def test_factors_and_biases_apart_in_memory(layer_backend, dtype: torch.dtype) -> None:
    z, dy, factor, offset = drawn(20, 12, dtype, bias=True)
    assert offset is not None
    wide, spread = factor.repeat_interleave(2), offset.repeat_interleave(3)
    found, expected = [], []
    for into, given in ((found, (wide[::2], spread[::3])), (expected, (factor, offset))):
        y = z.clone()
        multiply_(y, *given)
        into += [y.clone(), gain_gradients_(y, dy, *given), y]
    assert all(map(torch.equal, found, expected))


def test_a_gradient_of_a_wider_type(layer_backend) -> None:
    z, dy, factor, _ = drawn(20, 12, torch.bfloat16, bias=False)
    wide, narrow = z.clone(), z.clone()
    found, expected = gain_gradients_(wide, dy.float(), factor), gain_gradients_(narrow, dy, factor)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(wide, narrow)


@DTYPES
def test_a_factor_of_zero_has_no_gradient(layer_backend, dtype: torch.dtype) -> None:
    z, dy, factor, _ = drawn(5, 4, dtype, bias=False)
    factor[1] = 0
    multiply_(z, factor)
    assert not z[:, 1].any()
    found = gain_gradients_(z, dy, factor)
    assert found[1] == 0
    assert found.isfinite().all()


def test_sums_do_not_depend_on_threads() -> None:
    if load.compiled("layer") is None:
        pytest.skip("no C compiler")
    z, dy, factor, offset = drawn(500, 300, torch.bfloat16, bias=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(gain_gradients_(z.clone(), dy, factor, offset))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_16_bits_run_on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both give the same, so only this tells that it is there."""
    if load.compiled("layer") is None:
        pytest.skip("no C compiler")
    for name in ("multiply_reference_", "gain_sums_reference_"):
        monkeypatch.delattr(gain, name)
    z, dy, factor, offset = drawn(5, 4, torch.bfloat16, bias=True)
    multiply_(z, factor, offset)
    gain_gradients_(z, dy, factor, offset)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gain_of_inputs_is_the_formula(layer_backend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """A factor of zero has a gradient: its input is known."""
    z, dy, factor, _ = drawn(*shape, dtype, bias=False)
    factor[0] = 0
    slopes, before = dy.clone(), z.clone()
    found = input_gain_gradients_(z, slopes, factor)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), (dy.double() * z.double()).sum(0), rtol=1e-5, atol=1e-4)
    assert torch.equal(slopes, (dy.float() * factor).to(dtype))
    assert torch.equal(z, before)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shift_is_the_formula(layer_backend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    z, dy, amount, _ = drawn(*shape, dtype, bias=False)
    exact = z.double() + amount.double()
    add_(z, amount)
    assert torch.allclose(z.double(), exact, rtol=rounding(dtype), atol=1e-6)
    for slopes in (dy, dy[:1].expand(shape) if shape[0] else dy, dy.t().contiguous().t()):
        found = column_sums(slopes)
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), slopes.double().sum(0), rtol=1e-5, atol=1e-4)


def test_a_sum_over_many_rows_goes_on_growing(layer_backend) -> None:
    """In 16 bits it would stop at 256 ones."""
    ones = torch.ones(5000, 3, dtype=torch.bfloat16)
    assert torch.equal(column_sums(ones), torch.full((3,), 5000.0))
    assert torch.equal(input_gain_gradients_(ones, ones.clone(), torch.ones(3)), torch.full((3,), 5000.0))


def test_other_shapes_are_refused(layer_backend) -> None:
    z, dy, factor, _ = drawn(5, 4, torch.float32, bias=False)
    for given in ((z, factor[:3]), (z, factor.half()), (z[0], factor), (z, factor[None]), (z, factor, factor[:3])):
        with pytest.raises(ValueError, match="expected"):
            multiply_(*given)
    with pytest.raises(ValueError, match="expected"):
        gain_gradients_(z, dy[:3], factor)
    with pytest.raises(ValueError, match="expected"):
        gain_gradients_(z, dy[:, :3], factor)
    with pytest.raises(ValueError, match="expected"):
        input_gain_gradients_(z, dy, factor[:3])
    with pytest.raises(ValueError, match="expected"):
        add_(z, factor[:3])
