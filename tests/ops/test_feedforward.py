"""The feed-forward layer in one step: fp64 autograd, the single products to the bit, threads, memory, its borders."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference.compiler import OlderBuild
from reference.feedforward import (
    CASES,
    OVERLAPPING,
    PARTS,
    ROUNDING,
    Case,
    by_products_and_at_once,
    drawn,
    everywhere,
    exact,
    forward,
    learned,
    passes,
    rows_of,
)
from reference.measure import relative
from topwork.ops import feedforward as module
from topwork.ops.feedforward import DOWN, UP, Source, run_backward, run_forward
from topwork.ops.native import load
from topwork.ops.norm import rms_norm
from topwork.ops.prologues import Normed, RmsNorm

ALL = pytest.mark.parametrize("case", CASES + OVERLAPPING, ids=lambda case: f"{case.rows}-{case.d}-{case.f}")


@ALL
def test_it_is_fp64_autograds(case: Case, on_amx) -> None:
    layer = drawn(case)
    n, dy = rows_of(case)
    _, *found = passes(layer, n, dy)
    for mine, its in zip(found, exact(layer, n, dy)):
        assert relative(mine, its) < ROUNDING


def test_rows_an_odd_distance_apart(on_amx) -> None:
    layer, (n, dy) = drawn(CASES[5]), rows_of(CASES[5])

    def apart(x: Tensor) -> Tensor:
        return torch.full((len(x), x.shape[1] + 1), torch.nan).bfloat16()[:, :-1].copy_(x)

    both, y, inner = forward(layer, n)
    dn, its_dn = torch.empty_like(n), torch.empty_like(n)
    expected = run_backward(layer, dy, both, inner, dn, Source(n))
    its_both, its_y, its_inner = torch.empty_like(both), torch.empty_like(y), [torch.empty_like(s) for s in inner]
    run_forward(layer, apart(n), its_both, its_inner, its_y)
    found = run_backward(layer, apart(dy), its_both, its_inner, its_dn, Source(apart(n)))
    assert all(torch.equal(*pair) for pair in ((its_both, both), (its_y, y), (its_dn, dn)))
    for mine, its in zip(found, expected, strict=True):
        assert all(relative(*pair) < 1e-5 for pair in zip(mine, its, strict=True))


@ALL
def test_plain_torch_is_it_too(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "compiled", lambda _: None)
    layer = drawn(case)
    n, dy = rows_of(case)
    _, *found = passes(layer, n, dy)
    for mine, its in zip(found, exact(layer, n, dy)):
        assert relative(mine, its) < ROUNDING


def test_every_build_is_right(older_build: OlderBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not made for AMX leaves all of it to plain torch."""
    library, level = older_build("decoder")
    assert library.topwork_decoder_level() == level
    monkeypatch.setattr(load, "compiled", lambda name: library if name == "decoder" else None)
    if level == 3:
        monkeypatch.setattr(module, "feedforward_reference", None)
    n, dy = rows_of(CASES[5])
    layer = drawn(CASES[5])
    for mine, its in zip(passes(layer, n, dy)[1:], exact(layer, n, dy)):
        assert relative(mine, its) < ROUNDING


@ALL
def test_outputs_are_those_of_single_products_to_the_bit(case: Case, on_amx) -> None:
    """So are gradients up to the order of sums: of a few values of dn, of all of A's and B's."""
    (both, y, dx, *grads), found = by_products_and_at_once(case)
    if case.f % 16:  # then joined weights' terms are rounded apart from the product
        assert relative(found[0], both) < ROUNDING
        return
    assert torch.equal(found[0], both)
    assert torch.equal(found[1], y)
    assert (found[2] != dx).float().mean() <= 1e-3
    for mine, its in zip(found[2:], (dx, *grads)):
        assert relative(mine, its) < 1e-3


@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("parts", [(UP, DOWN), PARTS], ids=["up and down", "all"])
def test_the_inputs_gradient_is_too_where_terms_fill_whole_tiles(parts: tuple[int, ...], rank: int, on_amx) -> None:
    """Or one stands alone in its product: AMX sums what shares a tile in an order of its own."""
    rank = 32 if len(parts) == 3 else rank
    case = Case(200, 96, 160, tuple((at, at + 100, part, rank) for at in (0, 100) for part in parts))
    (_, _, dx, *_), found = by_products_and_at_once(case)
    assert torch.equal(found[2], dx)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_a_norm_before_it_is_made_again(weights: torch.dtype, unit_offset: bool, on_amx) -> None:
    case = CASES[5]
    layer, (x, dy) = drawn(case), rows_of(case)
    norm = RmsNorm(torch.randn(case.d).to(weights), 1e-5, unit_offset)
    n, rstd = rms_norm(x, norm.weight, norm.eps, unit_offset)
    both, y, inner = forward(layer, n)
    dn = torch.empty_like(n)
    of_n = run_backward(layer, dy, both, inner, dn, Source(n))
    for prologue, given, dx in (
        (norm, x, norm.backward(dn, (x, rstd))),
        (Normed(norm=norm, of=x, rstd=rstd), n, dn),
        (Normed(norm=norm, of=torch.cat([x, x], 1)[:, case.d :], rstd=rstd), n, dn),
    ):
        leaf = given.clone().requires_grad_()
        out = module.feedforward(leaf, layer, prologue)
        found = torch.autograd.grad(out, (leaf, *learned(layer)), dy)
        assert torch.equal(out, y)
        assert torch.equal(found[0], dx)
        assert all(torch.equal(*pair) for pair in zip(found[1:], (*of_n[0], *of_n[1]), strict=True))


@ALL
def test_the_number_of_threads_changes_nothing(case: Case, on_amx) -> None:
    layer, (n, dy) = drawn(case), rows_of(case)
    found = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found.append(passes(layer, n, dy))
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


def test_other_adapters_rows_change_nothing(on_amx) -> None:
    """Of the gradients of one that has rows 100 to 400, beside two others and alone."""
    beside = Case(470, 64, 96, (*everywhere(0, 100, 5), *everywhere(100, 400, 16), *everywhere(400, 470, 7)))
    layer, (n, dy) = drawn(beside), rows_of(beside)
    own = tuple(place._replace(term=replace(place.term, start=0, stop=300)) for place in layer.terms[3:6])
    found, alone = passes(layer, n, dy), passes(replace(layer, terms=own), n[100:400], dy[100:400])
    together = (*(x[100:400] for x in found[:3]), *found[6:9], *found[15:18])
    assert all(torch.equal(*pair) for pair in zip(together, alone[:9], strict=True))


def test_what_is_not_finite_stays_in_its_rows(on_amx) -> None:
    """An adapter that has diverged, beside another whose rows share tiles with its own."""
    case = Case(60, 64, 96, (*everywhere(0, 23, 5), *everywhere(23, 60, 16)))
    layer, (n, dy) = drawn(case), rows_of(case)
    expected = passes(layer, n, dy)
    with torch.no_grad():
        for term, _ in layer.terms[:3]:
            term.b[7, 1] = torch.inf
            term.a[1, 7] = torch.nan
    found = passes(layer, n, dy)
    for mine, its in zip(found[:3], expected[:3]):
        assert mine[:23].isnan().any()
        assert relative(mine[23:], its[23:]) < ROUNDING
    for mine, its in zip((*found[6:9], *found[12:15]), (*expected[6:9], *expected[12:15])):
        assert relative(mine, its) < ROUNDING


def test_weights_that_stand_apart_round_the_inputs_gradient_twice(on_amx) -> None:
    layer, (n, dy) = drawn(CASES[5]), rows_of(CASES[5])
    apart = replace(layer, weights=tuple(weight.clone() for weight in layer.weights))
    both, y, dn, *rest = passes(apart, n, dy)
    expected_both, expected_y, expected_dn, *others = passes(layer, n, dy)
    assert torch.equal(both, expected_both)
    assert torch.equal(y, expected_y)
    assert relative(dn, expected_dn) < ROUNDING
    assert all(torch.equal(*pair) for pair in zip(rest, others, strict=True))


def test_the_gradient_may_take_the_place_of_gate_and_up(on_amx) -> None:
    layer, (n, dy) = drawn(CASES[5]), rows_of(CASES[5])
    both, _, inner = forward(layer, n)
    dn, its_dn = torch.empty_like(n), torch.empty_like(n)
    expected = run_backward(layer, dy, both, inner, its_dn, Source(n))
    found = run_backward(layer, dy, both, inner, dn, Source(n), in_place=True)
    assert torch.equal(dn, its_dn)
    for mine, its in zip(found, expected):
        assert all(torch.equal(*pair) for pair in zip(mine, its, strict=True))


class Bordered:
    """Hands out NaN between borders, which stand off the grid of cache lines and are looked at in the end."""

    def __init__(self) -> None:
        self.all: list[tuple[Tensor, Tensor]] = []

    def __call__(self, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
        count = torch.Size(shape).numel()
        whole = torch.full((count + 402,), 7.0).to(dtype)
        self.all.append((whole, whole[201 : 201 + count].view(*shape).fill_(torch.nan)))
        return self.all[-1][1]

    def assert_whole(self) -> None:
        for whole, inside in self.all:
            assert not inside.isnan().any()
            assert (whole[:201] == 7).all()
            assert (whole[-201:] == 7).all()


@ALL
def test_all_of_its_outputs_are_written_and_nothing_else(case: Case, on_amx, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, (n, dy), room = drawn(case), rows_of(case), Bordered()
    expected = passes(layer, n, dy)
    both, y, dn = (room((case.rows, width)) for width in (2 * case.f, case.d, case.d))
    inner = [room((stop - start, r)) for start, stop, _, r in case.terms]
    wide = torch.full((case.rows + 2, 3 * case.d), torch.nan).bfloat16()  # what stands around n and dy is not read
    given, grad = wide[1:-1, : case.d].copy_(n), wide[1:-1, case.d : 2 * case.d].copy_(dy)
    monkeypatch.setattr(torch, "empty_like", lambda x: room(x.shape, x.dtype))
    run_forward(layer, given, both, inner, y)
    all_da, all_db = run_backward(layer, grad, both, inner, dn, Source(given))
    room.assert_whole()
    assert all(torch.equal(*pair) for pair in zip((both, y, dn, *all_da, *all_db, *inner), expected, strict=True))


@ALL
def test_what_is_left_out_changes_nothing_else(case: Case, on_amx) -> None:
    layer, (n, dy) = drawn(case), rows_of(case)
    expected_both, y, inner = forward(layer, n)
    alone, both, again = (torch.full_like(x, torch.nan) for x in (y, expected_both, expected_both))
    run_forward(layer, n, None, [], alone)
    assert torch.equal(alone, y)
    others = [torch.full_like(s, torch.nan) for s in inner]
    run_forward(layer, n, both, others, None)
    assert all(torch.equal(*pair) for pair in zip((both, *others), (expected_both, *inner), strict=True))
    run_forward(layer, n, again, [], None)
    assert torch.equal(again, both)
    with_dn = run_backward(layer, dy, both, inner, torch.empty_like(n), Source(n))
    without = run_backward(layer, dy, both, inner, None, Source(n))
    for one, other in zip(with_dn, without):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
