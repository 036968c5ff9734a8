"""A residual batch's sum and its rounded branch: the formula in fp64, all parts of it, C beside the plain truth."""

import pytest
import torch
from torch import Tensor

from topwork.ops import residual
from topwork.ops.native import load
from topwork.ops.prologues import RmsNorm, normed
from topwork.ops.residual import add_and_round, add_and_round_reference, residual_branch, residual_norm

SHAPES = [(1, 1), (5, 3), (7, 576), (40, 1030), (0, 8), (3, 4096)]
PARTS = pytest.mark.parametrize(("adds", "rounds"), [(True, True), (True, False), (False, True), (False, False)])


@PARTS
@pytest.mark.parametrize(("multiplier", "by"), [(1.0, 1.0), (0.22, 1.0), (1.0, 0.22)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_it_is_the_formula_rounded_once(
    layer_backend, dtype: torch.dtype, multiplier: float, by: float, adds: bool, rounds: bool
) -> None:
    for shape in SHAPES:
        x, y = torch.randn(1, *shape), torch.randn(shape).to(dtype)
        exact = x.double() + (multiplier * y.double() if adds else 0)
        for in_place in (True, False) if adds else (True,):
            begun = x.clone()
            total = begun if in_place else torch.full_like(x, torch.nan)
            rounded = torch.full(shape, torch.nan, dtype=dtype) if rounds else None
            add_and_round(begun, y if adds else None, multiplier, total, rounded, by)
            assert torch.allclose(total.double(), exact, rtol=1e-6, atol=1e-6)
            assert in_place or torch.equal(begun, x)
            if rounded is not None:
                assert torch.equal(rounded, (total[0] * by).to(dtype))


@PARTS
def test_the_kernel_is_the_truth_to_the_bit(adds: bool, rounds: bool) -> None:
    if load.compiled("layer") is None:
        pytest.skip("no C compiler")
    for shape in SHAPES:
        x, y = torch.randn(1, *shape), torch.randn(shape).bfloat16()
        found: list[list[Tensor]] = []
        for run in (add_and_round, add_and_round_reference):
            total, rounded = torch.zeros_like(x) if adds else x, torch.zeros_like(y)
            run(x, y if adds else None, 0.3, total, rounded if rounds else None, 0.7)
            found.append([total, rounded])
        assert all(map(torch.equal, *found)), shape


def test_bf16_runs_on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would give the same, so only this tells that it is there."""
    if load.compiled("layer") is None:
        pytest.skip("no C compiler")

    def refused(*given: object) -> None:
        raise AssertionError("the truth ran in the kernel's place")

    monkeypatch.setattr(residual, "add_and_round_reference", refused)
    leaf = torch.randn(1, 5, 7).requires_grad_()
    outputs = residual_branch(leaf * 1, torch.bfloat16, torch.ones(5, 7).bfloat16())
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    assert torch.equal(leaf.grad, torch.full((1, 5, 7), 2.0))  # type: ignore[arg-type]


def test_views_with_gaps_are_left_to_the_truth(layer_backend) -> None:
    x, wide = torch.randn(1, 6, 10), torch.randn(6, 20).bfloat16()
    total, branch = torch.empty_like(x), torch.zeros(6, 20, dtype=torch.bfloat16)
    add_and_round(x, wide[:, 5:15], 1.0, total, branch[:, 3:13])
    assert torch.equal(total[0], x[0] + wide[:, 5:15].float())
    assert torch.equal(branch[:, 3:13], total[0].bfloat16())
    assert not branch[:, :3].any()
    assert not branch[:, 13:].any()


def test_nothing_beside_it_is_written(layer_backend) -> None:
    """A total that starts and ends within a larger buffer."""
    buffer, narrow = torch.full((100,), 7.0), torch.full((100,), 7.0, dtype=torch.bfloat16)
    total, rounded = buffer[10:45].view(1, 5, 7), narrow[11:46].view(5, 7)
    add_and_round(torch.ones(1, 5, 7), torch.ones(5, 7).bfloat16(), 1.0, total, rounded)
    assert total.eq(2).all()
    assert rounded.eq(2).all()
    assert buffer[:10].eq(7).all()
    assert buffer[45:].eq(7).all()
    assert narrow[:11].eq(7).all()
    assert narrow[46:].eq(7).all()


def test_other_shapes_are_refused(layer_backend) -> None:
    """The kernel sees bare memory."""
    x, y = torch.zeros(1, 4, 3), torch.zeros(4, 3).bfloat16()
    for total, other, rounded in (
        (x, y[:3], None), (x, y, y[:, :2]), (torch.zeros(1, 3, 4), y, None), (x, y[None, None, :2], None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="shapes"):
            add_and_round(x, other, 1.0, total, rounded)
    with pytest.raises(ValueError, match="shapes"):
        add_and_round(torch.zeros(2, 4, 3), None, 1.0, torch.zeros(2, 4, 3), None)


@pytest.mark.parametrize("adds", [True, False], ids=["sum", "stream alone"])
@pytest.mark.parametrize("unit_offset", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16 weight", "fp32 weight"])
def test_with_its_norm_it_is_both_one_after_the_other(
    layer_backend, weights: torch.dtype, unit_offset: bool, adds: bool
) -> None:
    """The stream, the norm and every gradient, to the bit; and the norm can be made again."""
    for rows, width in [(1, 1), (5, 3), (7, 576), (40, 1030), (3, 4096)]:
        norm = RmsNorm(1 + torch.rand(width).to(weights), 1e-5, unit_offset)
        given = [torch.randn(1, rows, width), *([torch.randn(rows, width).bfloat16()] if adds else [])]
        slopes = torch.randn(1, rows, width), torch.randn(rows, width).bfloat16()
        found: list[list[Tensor]] = []
        for together in (True, False):
            x, *more = leaves = [x.clone().requires_grad_() for x in given]
            y = more[0] if more else None
            if together:
                total, n, prologue = residual_norm(x, norm, torch.bfloat16, y, 0.3)
                _, kept = prologue.forward(n)
                assert torch.equal(prologue.recompute(kept), n)
            else:
                total, branch = residual_branch(x, torch.bfloat16, y, 0.3)
                n = normed(branch, norm)
            found.append([total, n, *torch.autograd.grad([total, n], leaves, slopes)])
        assert all(map(torch.equal, *found)), (rows, width)


@pytest.mark.parametrize("used", [0, 1], ids=["stream", "norm"])
def test_one_of_the_two_may_be_left_unused(layer_backend, used: int) -> None:
    norm, found = RmsNorm(torch.rand(6).bfloat16(), 1e-5), []
    given, addend = torch.randn(1, 4, 6), torch.randn(4, 6).bfloat16()
    for together in (True, False):
        x, y = given.clone().requires_grad_(), addend.clone().requires_grad_()
        if together:
            total, n, _ = residual_norm(x, norm, torch.bfloat16, y)
        else:
            total, branch = residual_branch(x, torch.bfloat16, y)
            n = normed(branch, norm)
        found.append(torch.autograd.grad((total, n)[used].float().pow(2).sum(), [x, y]))
    assert all(map(torch.equal, *found))


def test_a_norm_of_many_rows_does_not_depend_on_the_threads() -> None:
    """Enough of them for more than one thread."""
    norm, found = RmsNorm(torch.rand(96).bfloat16(), 1e-5), []
    x, y, dn = torch.randn(1, 700, 96), torch.randn(700, 96).bfloat16(), torch.randn(700, 96).bfloat16()
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            total, n, _ = residual_norm(leaf, norm, torch.bfloat16, y)
            found.append([total, n, *torch.autograd.grad([total, n], [leaf], [torch.ones_like(x), dn])])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))
