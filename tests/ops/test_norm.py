"""RMS norm: transformers' modules, fp64 autograd, odd sizes and views, and the C kernel beside the plain truth."""

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from topwork.ops import norm
from topwork.ops.native import load
from topwork.ops.norm import rms_norm, rms_norm_backward, rms_normalized

MODULES = {LlamaRMSNorm: False, Gemma2RMSNorm: True, Gemma3RMSNorm: True}
WIDTHS = (1, 7, 48, 576, 8195)
EPS = 1e-6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
OFFSETS = pytest.mark.parametrize("unit_offset", [False, True], ids=["weight", "1 + weight"])


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """The rule: fp32 within 1e-6 of the largest value; 16 bits equal in all but one of 500 values, and those by their
    last place. A sum that is made in another order moves rstd by its last place."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert ours.is_contiguous()
    if not ours.numel():
        return
    if ours.dtype == torch.float32:
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max().clamp(min=1)
    else:
        assert (ours != theirs).float().mean() <= 0.002 or (ours != theirs).sum() <= 1
        assert torch.allclose(ours.float(), theirs.float(), rtol=2 * torch.finfo(ours.dtype).eps, atol=0)


@DTYPES
@pytest.mark.parametrize("module", MODULES)
def test_it_is_transformers_module(layer_backend, module: type, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        theirs = module(width, eps=EPS).to(dtype)
        theirs.weight.data = drawn(width, dtype=dtype)
        for x in (drawn(5, width, dtype=dtype), drawn(2, 3, width, dtype=dtype) * 30, drawn(0, width, dtype=dtype)):
            y, rstd = rms_norm(x, theirs.weight.detach(), EPS, MODULES[module])
            assert_close(y, theirs(x).detach())
            assert rstd.shape == (x.numel() // width,)
            assert rstd.dtype == torch.float32
            again = rms_normalized(x, theirs.weight.detach(), rstd, MODULES[module])
            assert torch.equal(again, y), "the same bits from the kept rstd"


@DTYPES
@OFFSETS
def test_the_gradient_is_autograds(layer_backend, unit_offset: bool, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        x, dy = drawn(5, width, dtype=dtype), drawn(5, width, dtype=dtype)
        weight = drawn(width, dtype=dtype)
        plain = x.double().requires_grad_()
        scale = 1 + weight.double() if unit_offset else weight.double()
        (plain * torch.rsqrt(plain.pow(2).mean(-1, keepdim=True) + EPS) * scale).backward(dy.double())
        _, rstd = rms_norm(x, weight, EPS, unit_offset)
        ours = rms_norm_backward(dy, x, weight, rstd, unit_offset)
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        terms = (dy.double() * scale).abs().max() * rstd.max()  # which cancel: all of them where d is 1
        bound = 1e-6 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
        assert ((ours - plain.grad).abs() <= bound * plain.grad.abs() + 2e-6 * terms).all(), width


def test_the_truth_in_fp64_passes_gradcheck() -> None:
    weight = torch.randn(7, dtype=torch.float64)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    y, rstd = norm.rms_norm_reference(x, weight, EPS)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.allclose(rms_norm_backward(dy, x.detach(), weight, rstd.detach()), x.grad)


@OFFSETS
@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_views_give_what_copies_give(layer_backend, unit_offset: bool, of_weight: torch.dtype) -> None:
    weight = drawn(40, dtype=of_weight)
    wide, heads = drawn(6, 100, dtype=torch.bfloat16), drawn(6, 5, 64, dtype=torch.bfloat16)
    views = [wide[:, 3:43], wide[::2, :40], heads[:, 1:4, 24:], heads.transpose(0, 1)[..., :40], drawn(40, 6).T,
             drawn(2, 3, 2, 40), drawn(40), wide[:1, 3:43].expand(4, 40)]  # fmt: skip
    for view in views:
        if view.dtype != torch.bfloat16 and of_weight == torch.bfloat16:
            view = view.bfloat16()
        plain = view.contiguous().clone()
        y, rstd = rms_norm(view, weight, EPS, unit_offset)
        expected, expected_rstd = rms_norm(plain, weight, EPS, unit_offset)
        assert_close(y, expected)
        assert_close(rstd, expected_rstd)
        assert y.is_contiguous()
        assert torch.equal(rms_normalized(view, weight, rstd, unit_offset), y)
        dx = rms_norm_backward(view, view, weight, rstd, unit_offset)
        assert_close(dx, rms_norm_backward(plain, plain, weight, rstd, unit_offset))
        assert_close(dx, rms_norm_backward(plain, view, weight, rstd, unit_offset))


def test_a_strided_weight_is_read_in_its_order(layer_backend) -> None:
    weight, x = torch.randn(48, 2)[:, 0], torch.randn(3, 48)
    assert torch.equal(rms_norm(x, weight, EPS)[0], rms_norm(x, weight.contiguous(), EPS)[0])


@DTYPES
def test_nan_and_infinity_stay_in_their_rows(layer_backend, dtype: torch.dtype) -> None:
    x = torch.randn(4, 33)
    x[1, 32], x[2, 0] = float("nan"), float("inf")
    x, weight = x.to(dtype), drawn(33, dtype=dtype)
    y, rstd = rms_norm(x, weight, EPS)
    truth, truth_rstd = norm.rms_norm_reference(x, weight, EPS)
    assert torch.equal(y.isnan(), truth.isnan())
    assert torch.equal(rstd.isnan(), truth_rstd.isnan())
    assert y[1].isnan().all()
    assert y[2, 0].isnan()
    assert y[[0, 3]].isfinite().all()
    dx = rms_norm_backward(y, x, weight, rstd)
    assert torch.equal(dx.isnan(), norm.rms_norm_backward_reference(y, x, weight, rstd).isnan())
    assert dx[1].isnan().all()
    assert dx[[0, 3]].isfinite().all()


def test_zeros_are_normalized_to_zeros(layer_backend) -> None:
    y, rstd = rms_norm(torch.zeros(2, 48), torch.ones(48), 1e-6)
    assert torch.equal(y, torch.zeros(2, 48))
    assert torch.allclose(rstd, torch.full((2,), 1e3))


def test_the_number_of_threads_changes_nothing() -> None:
    x, dy, weight = drawn(150, 576, dtype=torch.bfloat16), drawn(150, 576, dtype=torch.bfloat16), drawn(576)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, rstd = rms_norm(x, weight, EPS)
        found.append((y, rstd, rms_norm_backward(dy, x, weight, rstd)))
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for parts in found[1:] for one, other in zip(parts, found[0], strict=True))


def test_the_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if load.compiled("layer") is None:
        pytest.skip("no C compiler")
    for name in ("rms_norm_reference", "rms_normalized_reference", "rms_norm_backward_reference"):
        monkeypatch.setattr(norm, name, None)
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = drawn(3, 48, dtype=dtype), drawn(48, dtype=dtype)
        _, rstd = rms_norm(x, weight, EPS)
        rms_normalized(x, weight, rstd)
        rms_norm_backward(x, x, weight, rstd)
    with pytest.raises(TypeError):
        rms_norm(drawn(3, 48).half(), drawn(48), EPS)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, rstd = torch.randn(5, 8), torch.randn(8), torch.randn(5)
    with pytest.raises(ValueError, match=r"weight is \[7\].*expected \[8\]"):
        rms_norm(x, weight[:7], EPS)
    with pytest.raises(ValueError, match=r"weight is \[8\] float32 on meta"):
        rms_norm(x, weight.to("meta"), EPS)
    with pytest.raises(ValueError, match="cannot normalize"):
        rms_norm(torch.zeros(5, 0), torch.zeros(0), EPS)
    with pytest.raises(ValueError, match="cannot normalize"):
        rms_norm(x.long(), weight, EPS)
    for wrong in (rstd[:4], rstd[:, None], rstd.double()):
        with pytest.raises(ValueError, match=r"rstd is .*expected that of the 5 rows"):
            rms_normalized(x, weight, wrong)
    for wrong in (x[:4], x.double(), x[None]):
        with pytest.raises(ValueError, match="dy is"):
            rms_norm_backward(wrong, x, weight, rstd)
