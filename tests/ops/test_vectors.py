"""Vectors that learn at a group of projections: gains, shifts, gains on inputs, against autograd in fp64."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from reference.groups import IN, PROLOGUES, SEGMENTS, T, a_group, an_input, both, masters
from reference.measure import relative
from topwork.ops.project import project
from topwork.ops.projection import Projection
from topwork.ops.prologues import Identity
from topwork.ops.vectors import Gain, Shift

pytestmark = pytest.mark.usefixtures("nan_where_nothing_was_written")
GAINS: dict[str, list[tuple[int, int]]] = {
    "all rows": [(0, T)],
    "some rows": [(4, 11), (17, T)],
    "no rows": [(3, 3)],
}


def with_gains(group: Sequence[Projection], ranges: Sequence[tuple[int, int]], with_bias: bool) -> list[Projection]:
    """A gain for each range on every projection but the second."""
    gained = []
    for at, projection in enumerate(group):
        factors = [(0.5 + torch.rand(projection.outputs)).requires_grad_() for _ in ranges if at != 1]
        gains = tuple(Gain(*rows, factor, with_bias) for rows, factor in zip(ranges, factors))
        gained.append(replace(projection, gains=gains))
    return gained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["with the bias", "without the bias"])
@pytest.mark.parametrize("ranges", list(GAINS))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gains(bias: bool, ranges: str, with_bias: bool, dtype: torch.dtype) -> None:
    """Outputs times a vector that learns, on top of terms: values, and the gradients of input, terms and factors."""
    torch.manual_seed(0)
    group = with_gains(a_group([24, 8, 9], SEGMENTS["two adapters"], bias), GAINS[ranges], with_bias)
    group = [
        replace(p, weight=p.weight.to(dtype), bias=None if p.bias is None else p.bias.to(dtype))  # type: ignore[union-attr]
        for p in group
    ]
    found, expected = both(an_input(Identity()).to(dtype), group, Identity())
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other, 1e-30) < (5e-6 if dtype == torch.float32 else 2e-2)


def with_shifts(group: Sequence[Projection], ranges: Sequence[tuple[int, int]]) -> list[Projection]:
    """A shift for each range on every projection but the second."""
    return [
        replace(p, shifts=tuple(Shift(*rows, torch.randn(p.outputs).requires_grad_()) for rows in ranges if at != 1))
        for at, p in enumerate(group)
    ]


def with_input_gains(projection: Projection, ranges: Sequence[tuple[int, int]]) -> Projection:
    """A gain for each range, one factor of it zero, which has a gradient all the same."""
    factors = [(0.5 + torch.rand(IN)).index_fill_(0, torch.tensor([3]), 0.0).requires_grad_() for _ in ranges]
    return replace(projection, input_gains=tuple(Gain(*rows, factor) for rows, factor in zip(ranges, factors)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gains", [True, False], ids=["gains", "no gains"])
@pytest.mark.parametrize("ranges", list(GAINS))
@pytest.mark.parametrize("segments", ["none", "two adapters"])
def test_shifts(segments: str, ranges: str, gains: bool, dtype: torch.dtype) -> None:
    """Something learned that is added to outputs, alone or on top of terms and below gains."""
    torch.manual_seed(0)
    group = with_shifts(a_group([24, 8, 9], SEGMENTS[segments], bias=True), GAINS[ranges])
    group = with_gains(group, GAINS["some rows"], with_bias=True) if gains else group
    group = [replace(p, weight=p.weight.to(dtype), bias=p.bias.to(dtype)) for p in group]  # type: ignore[union-attr]
    found, expected = both(an_input(Identity()).to(dtype), group, Identity())
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other, 1e-30) < (5e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("prologue", ["as is", "norm", "silu"])
@pytest.mark.parametrize("more", ["alone", "terms", "terms and gains"])
@pytest.mark.parametrize("ranges", list(GAINS))
def test_gains_on_inputs(ranges: str, more: str, prologue: str) -> None:
    """On their rows the base sees another input; terms see it as it is. Outputs that are made again have it too."""
    torch.manual_seed(0)
    group = a_group([48], SEGMENTS["none" if more == "alone" else "two adapters"], bias=True)
    group = [with_input_gains(group[0], GAINS[ranges])]
    if more == "terms and gains":
        group = with_gains(with_shifts(group, [(2, 14)]), GAINS["some rows"], with_bias=True)
    x, given = an_input(PROLOGUES[prologue]), PROLOGUES[prologue]
    before = x.clone()
    found, expected = both(x, group, given)
    assert torch.equal(x, before)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other, 1e-30) < 5e-6
    x.requires_grad_()
    y = project(x, group, given, keeps=False)
    torch.manual_seed(1)
    again = torch.autograd.grad(y, [x, *masters(group)], torch.randn(y.shape))
    for one, other in zip(again, found[1:], strict=True):
        assert torch.equal(one, other)


def test_gains_on_an_input_that_has_no_gradient() -> None:
    torch.manual_seed(0)
    group, x = [with_input_gains(a_group([48], SEGMENTS["two adapters"])[0], [(2, 9)])], an_input(Identity())
    dy = torch.randn(T, 48)
    found = torch.autograd.grad(project(x, group), masters(group), dy)
    x.requires_grad_()
    assert all(map(torch.equal, found, torch.autograd.grad(project(x, group), masters(group), dy)))


def test_a_gain_on_an_input_of_several_is_refused() -> None:
    group = a_group([5, 6], [])
    with pytest.raises(AssertionError, match="a group has one input"):
        project(an_input(Identity()), [with_input_gains(group[0], [(0, T)]), group[1]])


def test_in_bfloat16_vectors_round_once() -> None:
    """As the modules do that stand for them: y = W round(l x), y = round(W x + s)."""
    torch.manual_seed(0)
    weight, x = torch.randn(8, IN).bfloat16(), torch.randn(T, IN).bfloat16()
    factor, amount = 0.5 + torch.rand(IN), torch.randn(8)
    y = project(x, [Projection(weight, input_gains=(Gain(0, T, factor),))])
    assert torch.equal(y, F.linear((x.float() * factor).bfloat16(), weight))
    y = project(x, [Projection(weight, shifts=(Shift(0, T, amount),))])
    assert torch.equal(y, (F.linear(x, weight).float() + amount).bfloat16())


@pytest.mark.parametrize("factor", [0.0, 1e-4, 0.02, 3.0])
def test_a_gain_far_from_one_in_bfloat16(factor: float) -> None:
    """Its distance from one would be rounded, and all of a small factor with it."""
    torch.manual_seed(0)
    weight, x, dy = torch.randn(8, 12).bfloat16(), torch.randn(T, 12).bfloat16(), torch.randn(T, 8).bfloat16()
    gain = torch.full((8,), factor, requires_grad=True)
    y = project(x, [Projection(weight, gains=(Gain(0, T, gain),))])
    plain = F.linear(x, weight).float()
    assert relative(y, plain * factor, 1e-30) < 4e-3 * (factor > 0) + 1e-9
    (found,) = torch.autograd.grad(y, gain, dy)
    expected = (plain * dy.float()).sum(0) if factor else torch.zeros(8)
    assert relative(found, expected, 1e-30) < 1e-2


@pytest.mark.parametrize("with_bias", [True, False], ids=["with the bias", "without the bias"])
def test_gains_when_what_follows_changes_the_output_in_place_and_back(with_bias: bool) -> None:
    """As the rotation of queries and keys does: forward in place, and undone before this backward pass."""

    class Negated(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.mark_dirty(y)
            ctx.y = y
            return y.neg_()

        @staticmethod
        def backward(ctx, dy):
            ctx.y.data.neg_()
            return -dy

    torch.manual_seed(0)
    group = with_gains(a_group([24, 8, 9], SEGMENTS["two adapters"], True), GAINS["some rows"], with_bias)
    given, dy = an_input(Identity()).requires_grad_(), torch.randn(T, 41)
    learned = [given, *masters(group)]
    expected = torch.autograd.grad(project(given, group), learned, dy, allow_unused=True)
    found = torch.autograd.grad(Negated.apply(project(given, group)), learned, -dy, allow_unused=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("outputs", [[24, 8, 9], [16, 8, 9]], ids=["made again", "kept"])
@pytest.mark.parametrize("prologue", ["as is", "norm"])
def test_outputs_that_only_gains_need(prologue: str, outputs: list[int]) -> None:
    """Made again going backward where the input (40 values) is not wider, to the bit; what came of them may be gone."""
    torch.manual_seed(0)
    given, norm = an_input(Identity()), PROLOGUES[prologue]
    group = with_gains(a_group(outputs, SEGMENTS["two adapters"], True), GAINS["some rows"], with_bias=False)
    results, kept = [], []
    for keeps in (True, False):
        x = given.clone().requires_grad_()
        y = project(x, group, norm, keeps)
        context = y.grad_fn
        kept.append(context.out is not None)  # type: ignore[union-attr]
        value = y.detach().clone()
        if not keeps and not kept[-1]:
            y.detach().fill_(torch.nan)
        results.append([value, *torch.autograd.grad(y, [x, *masters(group)], torch.ones_like(y), allow_unused=True)])
    assert kept == [True, sum(outputs) < IN]
    assert all(one is other or torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("keeps", [True, False])
def test_gains_gone_through_twice(keeps: bool) -> None:
    """The first backward pass has written over what was kept."""
    torch.manual_seed(0)
    group = with_gains(a_group([24, 8, 9], SEGMENTS["two adapters"]), GAINS["some rows"], with_bias=True)
    x = an_input(Identity()).requires_grad_()
    learned = [x, *masters(group)]
    y = project(x, group, keeps=keeps)
    dy = torch.randn_like(y)
    first, second = (torch.autograd.grad(y, learned, dy, allow_unused=True, retain_graph=True) for _ in range(2))
    assert all(one is other or torch.equal(one, other) for one, other in zip(first, second, strict=True))
