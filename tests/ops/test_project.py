"""A group of linear layers with a prologue and LoRA terms: the hand-written backward pass against autograd in fp64."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.kept import kept_by
from reference.measure import relative
from topwork.ops.bundles import LowRank, bundled
from topwork.ops.dropout import Dropout, stays
from topwork.ops.packed import Packed, pack_4bit, pack_int8
from topwork.ops.project import Gain, Gated, Identity, Projection, Prologue, RmsNorm, project, projection_of

T, IN = 23, 40
PROLOGUES: dict[str, Prologue] = {
    "as is": Identity(),
    "norm": RmsNorm(1 + 0.3 * torch.randn(IN, generator=torch.Generator().manual_seed(0)), 1e-5),
    "norm with offset": RmsNorm(0.3 * torch.randn(IN, generator=torch.Generator().manual_seed(0)), 1e-6, True),
    "silu": Gated("silu"),
    "gelu": Gated("gelu_tanh"),
}
SEGMENTS: dict[str, list[tuple[int, int]]] = {
    "one adapter": [(0, T)],
    "two adapters": [(0, 9), (9, T)],
    "beside the bare base": [(4, 11), (17, T)],
    "an empty one": [(0, 5), (5, 5), (5, T)],
    "none": [],
}
OUTPUTS = {"one": [17], "three": [24, 8, 9]}


def a_group(outputs: Sequence[int], segments: Sequence[tuple[int, int]], bias: bool = False) -> list[Projection]:
    """Random projections; ranks and scalings differ from term to term, and not every projection has every term."""
    group = []
    for number, out in enumerate(outputs):
        terms = []
        for at, (start, stop) in enumerate(segments):
            if number == 1 and at == 1:
                continue
            r = 3 + number + 2 * at
            a, b = torch.randn(r, IN) / math.sqrt(IN), torch.randn(out, r)
            terms.append(LowRank(start, stop, a.requires_grad_(), b.requires_grad_(), 0.5 + at + number))
        group.append(Projection(torch.randn(out, IN), torch.randn(out) if bias else None, tuple(terms)))
    return group


def masters(group: Sequence[Projection]) -> list[Tensor]:
    terms = [tensor for projection in group for term in projection.terms for tensor in (term.a, term.b)]
    return terms + [gain.factor for projection in group for gain in projection.gains]


def truth(x: Tensor, group: Sequence[Projection], prologue: Prologue) -> Tensor:
    """The same formula, one layer at a time, for autograd."""
    if isinstance(prologue, RmsNorm):
        weight = prologue.weight.double() + (1 if prologue.unit_offset else 0)
        n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + prologue.eps) * weight
    elif isinstance(prologue, Gated):
        gate, up = x.chunk(2, -1)
        n = (F.silu(gate) if prologue.kind == "silu" else F.gelu(gate, approximate="tanh")) * up
    else:
        n = x
    parts = []
    for projection in group:
        weight = projection.weight.dense() if isinstance(projection.weight, Packed) else projection.weight
        y = F.linear(n, weight.double(), None if projection.bias is None else projection.bias.double())
        for term in projection.terms:
            rows = torch.arange(len(x))
            inside = ((rows >= term.start) & (rows < term.stop))[:, None]
            y = y + inside * (term.scaling * n @ term.a.double().t() @ term.b.double().t())
        for gain in projection.gains:
            rows = torch.arange(len(x))
            inside = ((rows >= gain.start) & (rows < gain.stop))[:, None]
            left_alone = 0 if gain.with_bias or projection.bias is None else projection.bias.double()
            y = torch.where(inside, (y - left_alone) * gain.factor.double() + left_alone, y)
        parts.append(y)
    return torch.cat(parts, -1)


def an_input(prologue: Prologue, rows: int = T) -> Tensor:
    return torch.randn(rows, 2 * IN if isinstance(prologue, Gated) else IN)


def both(x: Tensor, group: Sequence[Projection], prologue: Prologue) -> tuple[list[Tensor], list[Tensor]]:
    """(output, dx, dA, dB, ...) of `project`, and of the truth in fp64."""
    found = []
    for run, given in ((project, x), (truth, x.double())):
        given = given.detach().clone().requires_grad_()
        y = run(given, group, prologue)
        value = y.detach().clone()  # the backward pass of gains writes over it
        torch.manual_seed(1)
        dy = torch.randn(y.shape).to(y.dtype)
        learned = masters(group)
        grads = torch.autograd.grad(y, [given, *learned], dy.to(x.dtype).to(y.dtype), allow_unused=True)
        found.append([value, *(torch.zeros(1) if g is None else g for g in grads)])
    return found[0], found[1]


@pytest.mark.parametrize("prologue", list(PROLOGUES))
@pytest.mark.parametrize("segments", list(SEGMENTS))
@pytest.mark.parametrize("outputs", list(OUTPUTS))
def test_values_and_gradients(prologue: str, segments: str, outputs: str) -> None:
    torch.manual_seed(0)
    group = a_group(OUTPUTS[outputs], SEGMENTS[segments], bias=outputs == "three")
    found, expected = both(an_input(PROLOGUES[prologue]), group, PROLOGUES[prologue])
    assert len(found) == 2 + len(masters(group))
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other, 1e-30) < 3e-6


@pytest.mark.parametrize("prologue", list(PROLOGUES))
def test_in_bfloat16_every_gradient_points_the_same_way(prologue: str) -> None:
    torch.manual_seed(0)
    given, group = PROLOGUES[prologue], a_group([64, 32, 32], SEGMENTS["two adapters"])
    if isinstance(given, RmsNorm):
        given = replace(given, weight=given.weight.bfloat16())
    group = [replace(p, weight=p.weight.bfloat16()) for p in group]  # type: ignore[union-attr]
    found, expected = both(an_input(given).bfloat16(), group, given)
    for one, other in zip(found, expected, strict=True):
        assert float(F.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0)) > 0.9999


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("prologue", ["as is", "norm", "silu"])
def test_few_rows(rows: int, prologue: str) -> None:
    group = a_group([5, 6, 7], [(0, rows)])
    found, expected = both(an_input(PROLOGUES[prologue], rows), group, PROLOGUES[prologue])
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert relative(one, other, 1e-30) < 3e-6 or rows == 0


@pytest.mark.parametrize("prologue", ["as is", "norm", "silu"])
def test_rows_of_a_wider_buffer(prologue: str) -> None:
    given, group = PROLOGUES[prologue], a_group([8, 8, 8], [(0, T)])
    whole = torch.cat([torch.randn(T, 3), x := an_input(given), torch.randn(T, 5)], 1)
    assert relative(project(whole[:, 3:-5], group, given), project(x, group, given)) < 1e-6


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_joined_weights_are_one_product(bias: bool) -> None:
    torch.manual_seed(0)
    group, x = a_group([24, 8, 9], SEGMENTS["two adapters"], bias), an_input(Identity()).requires_grad_()
    whole = torch.cat([p.weight for p in group])  # type: ignore[misc]
    joined = Projection(whole, torch.cat([p.bias for p in group]) if bias else None)  # type: ignore[misc]
    dy, results = torch.randn(T, 41), []
    for given in (joined, None):
        y = project(x, group, joined=given)
        results.append([y.detach(), *torch.autograd.grad(y, [x, *masters(group)], dy)])
    for one, other in zip(*results, strict=True):
        assert relative(one, other) < 1e-6


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_packed_weights_are_their_dense_twins(kind: str) -> None:
    torch.manual_seed(0)
    group = a_group([64, 32, 32], SEGMENTS["two adapters"])
    packed = [
        replace(p, weight=pack_int8(p.weight) if kind == "int8" else pack_4bit(p.weight, "nf4", 64, True))  # type: ignore[arg-type]
        for p in group
    ]
    dense = [replace(p, weight=p.weight.dense()) for p in packed]  # type: ignore[union-attr]
    x = an_input(PROLOGUES["norm"])
    for one, other in zip(both(x, packed, PROLOGUES["norm"])[0], both(x, dense, PROLOGUES["norm"])[0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_dropout_is_what_autograd_makes_of_it(dtype: torch.dtype) -> None:
    """Two adapters, one of which drops out, one that does so in one place, and masks that two layers share or not."""
    torch.manual_seed(0)
    draws = torch.randint(0, 2**32, (T,))
    first = [Dropout(0.4, key, draws[:11]) for key in (7, 7, 9)]
    second = [None, None, Dropout(0.2, 9, draws[11:])]
    group = [
        replace(p, weight=p.weight.to(dtype), terms=tuple(replace(t, dropout=d) for t, d in zip(p.terms, dropouts)))  # type: ignore[union-attr]
        for p, *dropouts in zip(a_group([12, 7, 5], [(0, 11), (11, T)]), first, second)
    ]
    x, dy = torch.randn(T, IN).to(dtype), torch.randn(T, 24).to(dtype)
    results = []
    for run in (project, with_masks):
        given = x.clone().requires_grad_()
        y = run(given, group)
        results.append([y.detach(), *torch.autograd.grad(y, [given, *masters(group)], dy.to(y.dtype))])
    for one, other in zip(*results, strict=True):
        assert relative(one, other) < (2e-6 if dtype == torch.float32 else 1e-2)


def with_masks(x: Tensor, group: Sequence[Projection]) -> Tensor:
    """The truth in fp64, each term by itself."""
    parts = []
    for projection in group:
        y = F.linear(x.double(), projection.weight.double())  # type: ignore[union-attr]
        for term in projection.terms:
            given = x[term.start : term.stop].double()
            if term.dropout is not None:
                given = given * stays(term.dropout, term.dropout.seeds, IN) / (1 - term.dropout.p)
            update = term.scaling * given @ term.a.double().t() @ term.b.double().t()
            y = y + F.pad(update, (0, 0, term.start, T - term.stop))
        parts.append(y)
    return torch.cat(parts, -1)


def test_layers_with_one_mask_share_a_product() -> None:
    """Three A of an adapter that drops out the same for all see one dropped input."""
    dropout = Dropout(0.4, 7, torch.arange(T))
    group = [replace(p, terms=tuple(replace(t, dropout=dropout) for t in p.terms)) for p in a_group([5] * 3, [(0, T)])]
    bundles = bundled((term, slice(0, 5)) for projection in group for term in projection.terms)
    assert [len(bundle.terms) for bundle in bundles] == [3]


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


def test_ranges_that_overlap_add_up() -> None:
    """Terms of one projection whose rows are the same, or partly so."""
    torch.manual_seed(0)
    found, expected = both(an_input(Identity()), a_group([30], [(0, T), (0, T), (5, 14), (9, 20)]), Identity())
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other, 1e-30) < 3e-6


def test_a_gradient_that_was_expanded() -> None:
    torch.manual_seed(0)
    group, x = a_group([12, 7], SEGMENTS["two adapters"]), an_input(Identity()).requires_grad_()
    learned = [x, *masters(group)]
    found = torch.autograd.grad(project(x, group).sum(), learned)
    expected = torch.autograd.grad(truth(x.double(), group, Identity()).sum(), learned)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other, 1e-30) < 3e-6


def test_the_prologues_result_is_not_kept() -> None:
    """Kept are the input, one number a row, and r values a row for each adapted layer."""
    group, prologue = a_group([64, 64], [(0, T)]), PROLOGUES["norm"]
    x = an_input(prologue).requires_grad_()
    ranks = sum(term.a.shape[0] for projection in group for term in projection.terms)
    assert kept_by(lambda: project(x, group, prologue), [x, *masters(group)]) == 4 * T * (1 + ranks)


def test_a_product_left_out_still_has_its_gradient() -> None:
    torch.manual_seed(0)
    group = a_group([6, 5, 4], [(0, T)])
    x = an_input(Identity()).requires_grad_()
    dy = torch.randn(T, 15)
    whole = torch.autograd.grad(project(x, group), [x, *masters(group)], dy)
    y = project(x, group, skip_forward=True)
    assert not y.any()
    for one, other in zip(torch.autograd.grad(y, [x, *masters(group)], dy), whole, strict=True):
        assert torch.equal(one, other)


def test_what_is_no_frozen_linear_layer_has_no_projection() -> None:
    frozen = nn.Linear(4, 5).requires_grad_(False)
    found = projection_of(frozen)
    assert found is not None
    assert found.weight is frozen.weight
    assert found.bias is frozen.bias
    assert projection_of(nn.Linear(4, 5)) is None
    frozen.bias.requires_grad_()
    assert projection_of(frozen) is None
    assert projection_of(nn.LayerNorm(4)) is None
    assert projection_of(type("Own", (nn.Linear,), {})(4, 5).requires_grad_(False)) is None
