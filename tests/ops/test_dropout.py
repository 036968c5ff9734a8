"""Dropout by hashes: C and plain torch to the bit, shares and independence of what is drawn, gradients, views."""

import pytest
import torch
from torch import Tensor

from topwork.common.seeds import hashed
from topwork.ops import dropout as op
from topwork.ops.dropout import Dropout, drop, drop_reference, dropped, stays, token_seeds
from topwork.ops.native import load

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


def drawn(rows: int, share: float = 0.25, key: int = 0x9ABCDEF0) -> Dropout:
    return Dropout(share, key, token_seeds(torch.full((rows,), hashed(3)), torch.arange(rows)))


@DTYPES
@pytest.mark.parametrize("add", [False, True], ids=["", "added"])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 17), (70, 576), (300, 1030)], ids=str)
def test_it_is_the_mask_times_the_scale(layer_backend, shape: tuple[int, int], add: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, out, given = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), drawn(shape[0])
    value = torch.where(stays(given, given.seeds, shape[1]), x.float() / 0.75, 0)
    expected = ((out.float() + value) if add else value).to(dtype)
    assert torch.allclose(drop(x, given, out, add), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(out == 0, expected == 0)


def test_the_kernel_is_the_truth_to_the_bit() -> None:
    if load.compiled("layer") is None:
        pytest.skip("no C compiler")
    for draws in ([0, 2**32 - 1, 2**31, 5], [2**31 - 1, 1, 2, 3]):
        for key in (0, 2**32 - 1):
            given = Dropout(0.4, key, torch.tensor(draws))
            for dtype in (torch.float32, torch.bfloat16):
                x, found, expected = torch.randn(4, 99).to(dtype), torch.zeros(4, 99).to(dtype), torch.zeros(4, 99)
                expected = expected.to(dtype)
                for add in (False, True):
                    drop(x, given, found, add)
                    drop_reference(x, given, expected, add)
                    assert torch.equal(found, expected)


def test_floats_run_on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both give the same, so only this tells that it is there."""
    if load.compiled("layer") is None:
        pytest.skip("no C compiler")
    monkeypatch.delattr(op, "drop_reference")
    for dtype in (torch.float32, torch.bfloat16):
        dropped(torch.ones(4, 7, dtype=dtype), drawn(4))


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.05, 0.5, 0.99])
def test_the_share_that_is_dropped(share: float) -> None:
    """Of a million values, within five standard deviations."""
    given = drawn(1000, share)
    lost = float((~stays(given, given.seeds, 1000)).double().mean())
    assert abs(lost - share) <= 5 * (share * (1 - share) / 1e6) ** 0.5


def test_rows_columns_layers_and_steps_are_independent() -> None:
    """Correlations of masks are those of coins: within six standard deviations, whichever two are compared."""
    rows, columns = 512, 576
    masks = [stays(given, given.seeds, columns).double() for given in (drawn(rows), drawn(rows, key=hashed("other")))]
    step = Dropout(0.25, 0x9ABCDEF0, token_seeds(torch.full((rows,), hashed(3, 1)), torch.arange(rows)))
    masks.append(stays(step, step.seeds, columns).double())
    for mask in masks:
        for axis in (mask, mask.t()):
            found = torch.corrcoef(axis).fill_diagonal_(0)
            assert float(found.abs().max()) < 6 / axis.shape[1] ** 0.5
    for one, other in ((0, 1), (0, 2), (1, 2)):
        pair = torch.stack([masks[one].flatten(), masks[other].flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 6 / (rows * columns) ** 0.5
    shifted = torch.stack([masks[0][:, 1:].flatten(), masks[0][:, :-1].flatten()])
    assert abs(float(torch.corrcoef(shifted)[0, 1])) < 6 / (rows * columns) ** 0.5


def test_its_gradient_is_the_same_mask() -> None:
    x, given = torch.randn(30, 17, requires_grad=True), drawn(30)
    dy = torch.randn(17, 30).t()  # rows apart
    (found,) = torch.autograd.grad(dropped(x, given), x, dy)
    assert torch.equal(found, torch.where(stays(given, given.seeds, 17), dy * given.scale, 0))
    assert torch.autograd.gradcheck(
        lambda x: dropped(x, given), torch.randn(30, 4, dtype=torch.float64).requires_grad_()
    )


@DTYPES
def test_nothing_beside_a_view_is_written(layer_backend, dtype: torch.dtype) -> None:
    wide, into, given = torch.randn(9, 50).to(dtype), torch.full((9, 50), 7.0).to(dtype), drawn(9)
    part = Dropout(given.p, given.key, given.seeds[2:8])
    drop(wide[2:8, 11:44], part, into[2:8, 11:44])
    whole = torch.zeros(6, 33).to(dtype)
    drop(wide[2:8, 11:44].contiguous(), part, whole)
    assert torch.equal(into[2:8, 11:44], whole)
    into[2:8, 11:44] = 7
    assert into.eq(7).all()


def test_draws_apart_in_memory(layer_backend) -> None:
    x, given = torch.randn(6, 33), drawn(12)
    strided = Dropout(given.p, given.key, given.seeds[::2])
    packed = Dropout(given.p, given.key, given.seeds[::2].clone())
    assert torch.equal(drop(x, strided, torch.zeros_like(x)), drop(x, packed, torch.zeros_like(x)))


def test_almost_all_is_dropped(layer_backend) -> None:
    """The least hash that stays is a number of 32 bits."""
    x, given = torch.ones(40, 40), drawn(40, share=1 - 2**-40)
    assert not drop(x, given, torch.ones_like(x)).any()


def test_what_was_dropped_was_not_looked_at(layer_backend) -> None:
    """An infinite value that drops out leaves no NaN."""
    given, x = drawn(20), torch.full((20, 33), torch.inf)
    found = drop(x, given, torch.zeros_like(x))
    assert torch.equal(found, torch.where(stays(given, given.seeds, 33), torch.inf, 0.0))


def test_other_shapes_are_refused(layer_backend) -> None:
    x, given = torch.zeros(4, 3), drawn(4)
    wrong: list[tuple[Tensor, Dropout, Tensor]] = [
        (x, given, x[:3]), (x, given, x.bfloat16()), (x[0], given, x[0]), (x, drawn(3), x),
        (x, Dropout(0.1, 0, given.seeds.int()), x), (x, Dropout(1.0, 0, given.seeds), x),
    ]  # fmt: skip
    for case in wrong:
        with pytest.raises(ValueError, match="expected"):
            drop(*case)
