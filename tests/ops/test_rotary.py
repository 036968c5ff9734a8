"""Rotary embedding in place: transformers' function, its transpose, views, parts of heads, C beside the plain truth."""

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from topwork.ops import rotary
from topwork.ops.native import load
from topwork.ops.rotary import rotate_, rotate_reference_

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
INVERSE = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def tables(tokens: int, rotated: int) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, rotated] whose halves differ, as the formula allows."""
    angles = torch.randn(tokens, rotated) * 3
    return angles.cos(), angles.sin()


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' function on x [T, H, D], where a whole head is rotated."""
    rotated, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=1)
    return rotated


def test_it_is_transformers_function_in_fp32(layer_backend) -> None:
    for tokens, heads, width in ((5, 3, 64), (1, 1, 2), (7, 9, 48), (3, 2, 34), (0, 3, 64), (4, 0, 64)):
        x, (cos, sin) = torch.randn(tokens, heads, width), tables(tokens, width)
        expected = plain(x, cos, sin)
        rotate_(x, cos, sin)
        assert torch.equal(x, expected), (tokens, heads, width)


@INVERSE
@pytest.mark.parametrize("of_tables", [torch.float32, None], ids=["fp32 tables", "its type"])
@DTYPES
def test_it_is_the_formula_in_fp32_rounded_once(
    layer_backend, dtype: torch.dtype, of_tables: torch.dtype | None, inverse: bool
) -> None:
    for rotated in (64, 40, 2, 0):
        x = torch.randn(5, 3, 64).to(dtype)
        cos, sin = (table.to(of_tables or dtype) for table in tables(5, rotated))
        expected, half = x.float(), rotated // 2
        for t in range(5):
            for i in range(half):
                c1, c2, s1, s2 = cos[t, i], cos[t, half + i], sin[t, i], sin[t, half + i]
                rows = [[c1, s2], [-s1, c2]] if inverse else [[c1, -s1], [s2, c2]]
                turn = torch.tensor(rows).float()
                pair = x[t, :, [i, half + i]].float()
                expected[t, :, [i, half + i]] = pair[:, :1] * turn[:, 0] + pair[:, 1:] * turn[:, 1]
        rotate_(x, cos, sin, inverse)
        assert torch.equal(x, expected.to(dtype)), rotated


def test_the_inverse_is_the_gradient(layer_backend) -> None:
    x, (cos, sin) = torch.randn(5, 3, 48, dtype=torch.float64, requires_grad=True), tables(5, 48)
    gradient = torch.randn(5, 3, 48)
    plain(x, cos.double(), sin.double()).backward(gradient.double())
    rotate_(gradient, cos, sin, inverse=True)
    assert torch.allclose(gradient.double(), x.grad, atol=1e-6)


@INVERSE
@DTYPES
def test_views_are_rotated_where_they_lie(layer_backend, dtype: torch.dtype, inverse: bool) -> None:
    buffer = torch.randn(6, 400).to(dtype)
    places = {
        "heads of a wider row": lambda b: b[:, 8:200].view(6, 3, 64),
        "every second row": lambda b: b[::2, :128].view(3, 2, 64),
        "heads with gaps": lambda b: b[:, :384].view(6, 3, 128)[..., 30:94],
        "heads before tokens": lambda b: b.view(-1)[:2304].view(6, 6, 64).transpose(0, 1),
        "one token": lambda b: b[2:3, :64].view(1, 1, 64),
    }
    for name, place in places.items():
        cos, sin = tables(place(buffer).shape[0], 64)
        ours, theirs = buffer.clone(), buffer.clone()
        copied = place(ours).clone()
        rotate_(place(ours), cos, sin, inverse)
        rotate_reference_(copied, cos, sin, inverse)
        place(theirs).copy_(copied)
        assert torch.equal(ours, theirs), f"{name}: rotated there, and all else untouched"


def test_tables_may_be_views(layer_backend) -> None:
    x, (cos, sin) = torch.randn(5, 2, 16), tables(5, 16)
    for both in (torch.cat([cos, sin], 1).split(16, 1), (cos.T.contiguous().T, sin.T.contiguous().T)):
        ours, theirs = x.clone(), x.clone()
        rotate_(ours, *both)
        rotate_(theirs, cos, sin)
        assert torch.equal(ours, theirs)
    one = cos[:1].expand(5, 16), sin[:1].expand(5, 16)
    ours, theirs = x.clone(), x.clone()
    rotate_(ours, *one)
    rotate_(theirs, one[0].contiguous(), one[1].contiguous())
    assert torch.equal(ours, theirs)


@DTYPES
def test_nan_and_infinity_stay_in_their_pairs(layer_backend, dtype: torch.dtype) -> None:
    x, (cos, sin) = torch.randn(3, 2, 64), tables(3, 64)
    x[1, 0, 5], x[2, 1, 40] = float("nan"), float("inf")
    x = x.to(dtype)
    rotate_(x, cos, sin)
    assert x.isfinite().logical_not().nonzero().tolist() == [[1, 0, 5], [1, 0, 37], [2, 1, 8], [2, 1, 40]]
    assert x[1, 0, [5, 37]].isnan().all()
    assert x[2, 1, [8, 40]].isinf().all()


def test_the_number_of_threads_changes_nothing() -> None:
    x, (cos, sin) = torch.randn(200, 3, 64).bfloat16(), tables(200, 64)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(x.clone())
        rotate_(found[-1], cos, sin)
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if load.compiled("layer") is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(rotary, "rotate_reference_", None)
    for dtype in (torch.float32, torch.bfloat16):
        rotate_(torch.randn(3, 2, 16).to(dtype), *tables(3, 16))
    with pytest.raises(TypeError):
        rotate_(torch.randn(3, 2, 16).half(), *tables(3, 16))


def test_what_does_not_fit_is_refused() -> None:
    x, (cos, sin) = torch.randn(5, 3, 16), tables(5, 16)
    for wrong in (x[0], x.long(), x[..., ::2], x.transpose(1, 2)):
        with pytest.raises(ValueError, match="cannot rotate"):
            rotate_(wrong, cos, sin)
    for wrong in (x[:1].expand(5, 3, 16), x[:, :1].expand(5, 3, 16), x.view(-1).as_strided((5, 3, 16), (16, 16, 1))):
        with pytest.raises(ValueError, match="share memory"):
            rotate_(wrong, cos, sin)
    for wrong in (sin[:4], sin[:, :8], sin.bfloat16(), sin.to("meta")):
        with pytest.raises(ValueError, match="expected two alike"):
            rotate_(x, cos, wrong)
    for wrong in (cos[:4], cos[:, :15], torch.cat([cos, cos], 1), cos[0]):
        with pytest.raises(ValueError, match="even R <= 16"):
            rotate_(x, wrong, wrong)
    with pytest.raises(ValueError, match="expected float32 or the type of what they turn"):
        rotate_(x, cos.double(), sin.double())
