"""A group of linear layers with a prologue and LoRA terms: the hand-written backward pass against autograd in fp64."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.groups import IN, PROLOGUES, SEGMENTS, T, a_group, an_input, both, masters, truth
from reference.kept import kept_by
from reference.measure import relative
from topwork.ops import project as ops_project
from topwork.ops import projection as ops_projection
from topwork.ops.bundles import bundled
from topwork.ops.dropout import Dropout, stays
from topwork.ops.grouped import Product, grouped_products
from topwork.ops.packed import pack_4bit, pack_int8
from topwork.ops.project import project
from topwork.ops.projection import Projection, projection_of
from topwork.ops.prologues import Identity, RmsNorm

pytestmark = pytest.mark.usefixtures("nan_where_nothing_was_written")
OUTPUTS = {"one": [17], "three": [24, 8, 9]}


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


@pytest.mark.parametrize("prologue", list(PROLOGUES))
@pytest.mark.parametrize("outputs", [[24], [24, 8, 9]], ids=["one", "three"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_terms_and_biases_as_addends_of_the_base_product(
    bias: bool, outputs: list[int], prologue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on AMX, on any processor: the same values and gradients, every term once, forward and backward."""
    torch.manual_seed(0)
    met: list[int] = []

    def spied(products: Sequence[Product]) -> None:
        met.extend(len(product.addends) for product in products)
        grouped_products(products)

    monkeypatch.setattr(ops_project, "multiplies_all", lambda _: True)
    for module in (ops_project, ops_projection):
        monkeypatch.setattr(module, "grouped_products", spied)
    group = a_group(outputs, SEGMENTS["two adapters"], bias)
    found, expected = both(an_input(PROLOGUES[prologue]), group, PROLOGUES[prologue])
    forward = sum(len(projection.terms) + bias for projection in group)
    backward = len(SEGMENTS["two adapters"]) if len(group) > 1 else 0  # one layer's are with A's and B's gradients
    assert sum(met) == forward + backward
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other, 1e-30) < 3e-6


def without_terms(group: Sequence[Projection]) -> list[Projection]:
    return [replace(projection, terms=()) for projection in group]


def in_bfloat16(group: Sequence[Projection], kind: str, b_times: float) -> list[Projection]:
    """Frozen layers in bf16, and B times a number."""
    changed = []
    for p in group:
        weight = p.weight.bfloat16()  # type: ignore[union-attr]
        terms = tuple(replace(t, b=(b_times * t.b.detach()).requires_grad_()) for t in p.terms)
        bias = None if p.bias is None else (0.01 * p.bias).bfloat16()  # on top of a large one a term would be lost
        held = pack_4bit(weight, "nf4", 64, True) if kind == "nf4" else weight
        changed.append(replace(p, weight=held, bias=bias, terms=terms))
    return changed


@pytest.mark.parametrize("segments", ["one adapter", "two adapters", "beside the bare base"])
@pytest.mark.parametrize("kind", ["dense", "biased", "nf4", "by torch", "by torch, biased"])
def test_terms_below_what_bfloat16_resolves_are_not_lost(
    kind: str, segments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an adapter brings in its first steps is less than the last bit of most outputs and gradients: rounded
    together with the base's product it is there on average; added afterwards, a tenth of it would be. A single draw's
    share is 1.0 with a standard deviation of up to 0.4."""
    if kind.startswith("by torch"):
        monkeypatch.setattr(ops_project, "multiplies_all", lambda _: False)
    shares: list[list[float]] = []
    for seed in range(24):
        torch.manual_seed(seed)
        group = in_bfloat16(a_group([192, 64], SEGMENTS[segments], bias="biased" in kind), kind, 3e-4)
        x = torch.randn(T, IN).bfloat16()
        (y, dx, *_), (true_y, true_dx, *_) = both(x, group, Identity())
        (bare_y, bare_dx), (true_bare_y, true_bare_dx) = both(x, without_terms(group), Identity())
        pairs = (y, bare_y, true_y - true_bare_y), (dx, bare_dx, true_dx - true_bare_dx)
        shares.append([float(((a.double() - b.double()) * c).sum() / c.square().sum()) for a, b, c in pairs])
    for share in zip(*shares):
        assert 0.75 < sum(share) / len(share) < 1.25


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
    assert_drops(group, dtype)


def test_dropout_on_some_rows_alone() -> None:
    torch.manual_seed(0)
    draws = torch.randint(0, 2**32, (T,))
    (layer,) = a_group([12], [(4, 11)])
    (term,) = layer.terms
    group = [replace(layer, terms=(replace(term, dropout=Dropout(0.4, 7, draws[4:11])),))]
    assert_drops(group, torch.float32)


def assert_drops(group: Sequence[Projection], dtype: torch.dtype) -> None:
    x, results = torch.randn(T, IN).to(dtype), []
    dy = torch.randn(T, sum(projection.outputs for projection in group)).to(dtype)
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
