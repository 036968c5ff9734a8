"""grouped_products: the C kernel and plain torch against products in float64."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from reference.compiler import FEATURES, NATIVE, OlderBuild, needs_compiler, usual_kernels
from reference.measure import relative
from topwork.ops import grouped
from topwork.ops.grouped import Addend, Product, grouped_products, grouped_products_reference, multiplied
from topwork.ops.native import build, load

TYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
SIZES = (1, 2, 3, 5, 12, 13, 16, 17, 31, 48, 64, 65, 130, 200)
LONG = (300, 513, 1030)
"""Longer than a block of the summed axis, in one type or both, and than a piece has rows or columns."""

Run = Callable[[Sequence[Product]], None]


def plain(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns)


def turned(rows: int, columns: int) -> Tensor:
    return torch.randn(columns, rows).t()


def columns_of_wider_rows(rows: int, columns: int) -> Tensor:
    """What stands around them may not be read: it is NaN."""
    whole = torch.full((rows + 2, columns + 5), torch.nan)
    return whole[1:-1, 3:-2].copy_(torch.randn(rows, columns))


def turned_columns_of_wider_rows(rows: int, columns: int) -> Tensor:
    return columns_of_wider_rows(columns, rows).t()


Form = Callable[[int, int], Tensor]
FORMS: tuple[Form, ...] = (plain, turned, columns_of_wider_rows, turned_columns_of_wider_rows)


def typed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Another type at the same strides."""
    return x.to(dtype).as_strided(x.shape, x.stride()) if x.is_contiguous() or x.t().is_contiguous() else _cut(x, dtype)


def _cut(x: Tensor, dtype: torch.dtype) -> Tensor:
    whole = torch.full((x.untyped_storage().nbytes() // 4,), torch.nan, dtype=dtype)
    view = whole.as_strided(x.shape, x.stride(), x.storage_offset())
    view.copy_(x)
    return view


def drawn(rng: random.Random, m: int, n: int, k: int, alpha: float = 0.37) -> Product:
    """Random values, types and strides; what is to be overwritten is NaN before."""
    dtype, out_dtype, beta = rng.choice(TYPES), rng.choice(TYPES), rng.randrange(2)
    left, right = typed(rng.choice(FORMS)(m, k), dtype), typed(rng.choice(FORMS)(k, n), dtype)
    out = typed(rng.choice((plain, columns_of_wider_rows))(m, n), out_dtype)
    return Product(left, right, out if beta else out.fill_(torch.nan), alpha, beta)


def exact(product: Product) -> Tensor:
    left, right, out, alpha, beta, addends = product
    value = alpha * (left.double() @ right.double())
    for addend in addends:
        term = addend.alpha * (addend.left.double() @ addend.right.to(left.dtype).double())
        value[addend.row : addend.row + len(term), addend.column : addend.column + term.shape[1]] += term
    return value + out.double() if beta else value


def assert_right(products: Sequence[Product], run: Run = grouped_products) -> None:
    expected = [exact(product) for product in products]
    run(products)
    for product, value in zip(products, expected):
        assert product.out.shape == value.shape
        if value.numel():
            about = [(tuple(x.shape), x.stride(), x.dtype) for x in product[:3]]
            assert relative(product.out, value, 1e-30) < ROUNDING[product.out.dtype], about


def with_addends(rng: random.Random, grid: int = 16, forms: tuple[Form, ...] = FORMS) -> Product:
    """A product of bf16 with up to four addends anywhere in it, which may overlap and end within a tile."""
    m, n, k = rng.choice((1, 15, 33, 64, 130, 300)), rng.choice((16, 31, 48, 200, 330)), rng.choice((16, 31, 97, 600))
    left, right = typed(rng.choice(forms)(m, k), torch.bfloat16), typed(rng.choice(forms)(k, n), torch.bfloat16)
    addends = []
    for _ in range(rng.randrange(5)):
        row, column, inner = rng.randrange(m), rng.randrange(-(-n // grid)) * grid, rng.choice((1, 8, 16, 40))
        rows, columns = rng.randint(1, m - row), rng.randint(1, n - column)
        term = typed(rng.choice(forms)(rows, inner), torch.bfloat16), rng.choice(forms)(inner, columns)
        addends.append(Addend(*term, row, column, rng.choice((1.0, 2.0, 0.25))))
    out = typed(rng.choice((plain, forms[-2]))(m, n), rng.choice(TYPES))
    beta = rng.randrange(2)
    return Product(left, right, out if beta else out.fill_(torch.nan), 1.0, beta, tuple(addends))


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(load, "compiled", lambda _: None)
    elif not NATIVE:
        pytest.skip("no C compiler")
    return str(request.param)


@needs_compiler
@pytest.mark.parametrize("seed", range(25))
def test_products_of_any_shape_type_and_stride(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    assert_right([drawn(rng, *(rng.choice(SIZES) for _ in range(3))) for _ in range(12)])


@pytest.mark.parametrize("seed", range(12))
def test_addends_join_the_sums_they_are_added_to(seed: int, backend: str) -> None:
    """Where each is rounded as a product of its own, the output is rounded as often."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    forms = (plain, turned) if backend == "torch" else FORMS
    products = [with_addends(rng, rng.choice((16, 1)), forms) for _ in range(8)]
    expected = [exact(product) for product in products]
    grouped_products(products)
    for product, value in zip(products, expected):
        assert relative(product.out, value, 1e-30) < 2 * (1 + len(product.addends)) * ROUNDING[torch.bfloat16]


def test_the_truth_has_addends() -> None:
    assert_right([with_addends(random.Random(seed)) for seed in range(20)], grouped_products_reference)


def test_an_addend_below_what_the_output_resolves_is_not_lost(
    older_build: OlderBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an adapter brings in its first steps: rounded apart, to an output that is rounded already, it is nothing."""
    library, _ = older_build("grouped")
    monkeypatch.setattr(load, "compiled", lambda _: library)
    torch.manual_seed(0)
    n, weight, s = torch.randn(200, 64).bfloat16(), torch.randn(48, 64).bfloat16(), torch.randn(200, 16).bfloat16()
    b = 1e-4 * torch.randn(48, 16)
    whole, bare = torch.empty(200, 48).bfloat16(), torch.empty(200, 48).bfloat16()
    grouped_products([Product(n, weight.t(), whole, addends=(Addend(s, b.t(), 0, 0, 2.0),))])
    grouped_products([Product(n, weight.t(), bare)])
    term = 2 * s.double() @ b.double().t()
    share = float(((whole.double() - bare.double()) * term).sum() / term.square().sum())
    assert share == pytest.approx(1, abs=0.35)


@needs_compiler
@pytest.mark.parametrize("long", LONG)
@pytest.mark.parametrize("axis", range(3))
def test_each_axis_long(axis: int, long: int) -> None:
    rng = random.Random(axis)
    torch.manual_seed(0)
    for _ in range(8):
        shape = [rng.choice((1, 7, 16, 33)) for _ in range(3)]
        shape[axis] = long
        assert_right([drawn(rng, *shape)])


@pytest.mark.parametrize("k", [3072, 3073, 6178])
@pytest.mark.parametrize("rows", [64, 130])
def test_sums_over_more_than_one_block_of_amx_with_addends(
    rows: int, k: int, older_build: OlderBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many rows and with few, which have slabs of other lengths."""
    library, _ = older_build("grouped")
    monkeypatch.setattr(load, "compiled", lambda _: library)
    torch.manual_seed(0)
    for form, other in zip(FORMS, reversed(FORMS)):
        left, right = typed(form(rows, k), torch.bfloat16), typed(other(k, 72), torch.bfloat16)
        terms = (Addend(torch.randn(40, 24).bfloat16(), 9 * torch.randn(24, 40), rows - 40, 32, 2.0),)
        assert_right([Product(left, right, torch.full((rows, 72), torch.nan).bfloat16(), addends=terms)])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 64, 210])
def test_the_six_products_of_low_rank_terms(rows: int, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    n, y, s = (torch.randn(rows, width).to(dtype) for width in (72, 600, 24))
    a, b, dn, g = (torch.randn(shape).to(dtype) for shape in [(24, 72), (600, 8), (rows, 72), (rows, 24)])
    first, inner = torch.empty(rows, 24, dtype=dtype), s[:, 8:16]
    six = [
        Product(n, a.t(), first), Product(inner, b.t(), y.clone(), 2.0, 1), Product(y, b, torch.empty_like(g)[:, 8:16]),
        Product(y.t(), inner, torch.empty(600, 8), 0.5), Product(g.t(), n, torch.empty(24, 72)),
        Product(g, a, dn, beta=1),
    ]  # fmt: skip
    run = grouped_products
    if backend == "torch" and dtype == torch.bfloat16:  # mm's own rounding comes before the sum
        expected = [exact(product) for product in six]
        run(six)
        assert all(relative(product.out, value) < 6e-3 for product, value in zip(six, expected))
        return
    assert_right(six, run)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (0, 0, 0)])
def test_empty_outputs(shape: tuple[int, int, int], backend: str) -> None:
    assert_right([drawn(random.Random(0), *shape), drawn(random.Random(1), 4, 4, 4, 1.0)])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("form", [plain, turned])
def test_sums_of_nothing_are_zero(form: Callable[[int, int], Tensor], dtype: torch.dtype, backend: str) -> None:
    left, right = form(5, 0).to(dtype), form(0, 7).to(dtype)
    fresh, held = torch.full((5, 7), torch.nan), torch.randn(5, 7)
    before = held.clone()
    grouped_products([Product(left, right, fresh), Product(left, right, held, 2.0, 1)])
    assert (fresh == 0).all()
    assert torch.equal(held, before)


def test_no_products_at_all() -> None:
    grouped_products([])


@needs_compiler
def test_only_the_output_is_written() -> None:
    for dtype in TYPES:
        for shape in ((13, 37), (1, 1), (48, 64), (600, 3)):
            whole = torch.full((shape[0] + 2, shape[1] + 40), 7.0).to(dtype)
            out = whole[1:-1, 20:-20]
            for form in FORMS:
                left, right = typed(form(shape[0], 6), dtype), typed(form(6, shape[1]), dtype)
                grouped_products([Product(left, right, out)])
            out.fill_(7.0)
            assert (whole == 7.0).all()


@needs_compiler
def test_neither_threads_nor_neighbours_nor_rows_change_a_bit() -> None:
    rng, threads = random.Random(3), torch.get_num_threads()
    torch.manual_seed(3)
    products = [drawn(rng, *(rng.choice((1, 16, 70, 400, 700)) for _ in range(3))) for _ in range(10)]
    products = [product._replace(beta=0) for product in [*products, *(with_addends(rng) for _ in range(10))]]
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        grouped_products(products)
        results.append([product.out.clone() for product in products])
    torch.set_num_threads(threads)
    for product in products:
        grouped_products([product])
    results.append([product.out.clone() for product in products])
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0]))
    for product, whole in zip(products, results[0]):
        m = product.left.shape[0]
        part = rows_from(product, m // 3)
        grouped_products([part])
        assert torch.equal(part.out, whole[m // 3 :])


def rows_from(product: Product, first: int) -> Product:
    """The rows of a product from one on, to memory of their own."""
    addends = []
    for x in product.addends:
        skipped = max(0, first - x.row)
        if skipped < len(x.left):
            addends.append(x._replace(left=x.left[skipped:], row=max(0, x.row - first)))
    out = torch.empty_like(product.out[first:])
    return product._replace(left=product.left[first:], out=out, addends=tuple(addends))


def joined(rows: int, k: int) -> Product:
    """A product of bf16 with terms for all its rows, to fp32, in which every bit shows."""
    term = Addend(torch.randn(rows, 16).bfloat16(), torch.randn(16, 64), 0, 0, 2.0)
    return Product(
        torch.randn(rows, k).bfloat16(), torch.randn(k, 64).bfloat16(), torch.empty(rows, 64), addends=(term,)
    )


@pytest.mark.parametrize("k", [320, 896, 3072])
def test_terms_are_added_behind_all_of_a_products_own_sums(
    k: int, older_build: OlderBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However these are cut: 64 rows pack their right side piece by piece, 65 once for all."""
    library, _ = older_build("grouped")
    monkeypatch.setattr(load, "compiled", lambda _: library)
    torch.manual_seed(0)
    whole = joined(65, k)
    part = rows_from(whole, 1)
    grouped_products([whole])
    grouped_products([part])
    assert torch.equal(part.out, whole.out[1:])


def test_nor_do_more_threads_than_pieces(older_build: OlderBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are cut for the threads that there are, though not all of them have something to do."""
    library, _ = older_build("grouped")
    monkeypatch.setattr(load, "compiled", lambda _: library)
    torch.set_num_threads(10)
    for k, n in ((2016, 2590), (96, 40)):
        left, right = torch.randn(65, k).bfloat16(), torch.randn(k, n).bfloat16()
        out = torch.full((65, n), torch.nan)
        grouped_products([Product(left, right, out)])
        assert relative(out, torch.mm(left.float(), right.float())) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("k", [90, 2100])
def test_nor_do_threads_that_help_each_other(k: int, older_build: OlderBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few columns to share out, so that several take rows of the same; a long k goes in slabs, with more rows at a
    time where fewer threads are."""
    library, _ = older_build("grouped")
    monkeypatch.setattr(load, "compiled", lambda _: library)
    torch.manual_seed(0)
    threads, results = torch.get_num_threads(), []
    left, right = torch.randn(600, k).bfloat16(), torch.randn(k, 150).bfloat16()
    terms = (Addend(torch.randn(300, 8).bfloat16(), torch.randn(8, 64), 250, 64),)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(torch.full((600, 150), torch.nan))
        grouped_products([Product(left, right, results[-1], addends=terms)])
    torch.set_num_threads(threads)
    assert_right([Product(left, right, results[0], addends=terms)])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_nor_does_a_neighbour_whose_terms_are_made_apart(
    older_build: OlderBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose columns lie off the grid."""
    library, _ = older_build("grouped")
    monkeypatch.setattr(load, "compiled", lambda _: library)
    torch.manual_seed(0)
    one, other = joined(70, 96), joined(70, 96)
    off = other._replace(addends=(Addend(torch.randn(9, 8).bfloat16(), torch.randn(8, 20), 5, 3),))
    grouped_products([one])
    alone = one.out.clone()
    grouped_products([off, one])
    assert torch.equal(one.out, alone)


@pytest.mark.parametrize("count", [126, 127, 300])
def test_one_addend_many_times(count: int, backend: str) -> None:
    left, right = torch.randn(20, 40).bfloat16(), torch.randn(40, 32).bfloat16()
    term = Addend(torch.full((20, 1), 0.5).bfloat16(), torch.full((1, 32), 0.25), 0, 0)
    out = torch.empty(20, 32)
    grouped_products([Product(left, right, out, addends=(term,) * count)])
    assert relative(out, left.double() @ right.double() + count / 8) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("k", [64, 65])
def test_nor_does_a_row_that_is_not_finite_reach_the_one_before_it(k: int) -> None:
    """As torch's own product lets it on AMX where k is odd."""
    left, right = torch.randn(208, k).bfloat16(), torch.randn(k, 48).bfloat16()
    expected = torch.mm(left.float(), right.float())
    left[100:] = torch.nan
    found = multiplied(left, right)
    assert relative(found[:100], expected[:100]) < ROUNDING[torch.bfloat16]
    assert found[100:].isnan().all()


@pytest.mark.parametrize("poison", [torch.inf, torch.nan, 3.4e38])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_term_that_is_not_finite_stays_in_its_rows_and_columns(
    side: str, poison: float, older_build: OlderBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters that share tiles, rows or columns, with one that diverges: not a bit of theirs changes."""
    library, _ = older_build("grouped")
    monkeypatch.setattr(load, "compiled", lambda _: library)
    torch.manual_seed(0)
    left, right = torch.randn(40, 70).bfloat16(), torch.randn(70, 48).bfloat16()
    bad, good = (
        Addend(torch.randn(rows, 8).bfloat16(), torch.randn(8, n), at, 0) for rows, n, at in ((10, 24, 0), (30, 48, 10))
    )
    outs = []
    for value in (0.5, poison):
        (bad.left if side == "left" else bad.right)[3, 5] = value
        outs.append(torch.full((40, 48), torch.nan).bfloat16())
        grouped_products([Product(left, right, outs[-1], addends=(bad, good))])
    tame, wild = outs
    rows, columns = (slice(3, 4), slice(0, 24)) if side == "left" else (slice(0, 10), slice(5, 6))
    assert not wild[rows, columns].isfinite().any()
    wild[rows, columns] = tame[rows, columns]
    assert torch.equal(wild[10:], tame[10:])
    assert torch.equal(wild[:, 24:], tame[:, 24:])
    assert wild.isfinite().all()


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row_and_column(dtype: torch.dtype) -> None:
    left, right = torch.randn(30, 20).to(dtype), torch.randn(20, 40).to(dtype)
    left[7, 3], right[5, 11] = torch.nan, torch.inf
    out = torch.empty(30, 40)
    grouped_products([Product(left, right, out)])
    assert out[7].isnan().all()
    assert not out[:, 11].isfinite().any()
    out[7] = out[:, 11] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_views_without_a_contiguous_axis(dtype: torch.dtype, backend: str) -> None:
    one = torch.ones((), dtype=dtype).expand(6, 8)
    spread = torch.randn(8, 20).to(dtype)[:, ::2]
    out = torch.empty(6, 10)
    grouped_products([Product(one, spread, out)])
    assert relative(out, one.double() @ spread.double()) < ROUNDING[dtype]


def test_addends_that_do_not_fit_are_refused() -> None:
    left, right, out = torch.randn(3, 4), torch.randn(4, 5), torch.randn(3, 5)
    fits = Addend(torch.randn(2, 3), torch.randn(3, 4), 1, 1)
    for wrong in (fits._replace(row=2), fits._replace(column=2), fits._replace(column=-1), fits._replace(left=left)):
        with pytest.raises(ValueError, match=r"are expected|an addend of"):
            grouped_products([Product(left, right, out, addends=(wrong,))])
    with pytest.raises(ValueError, match=r"alpha is 2\.0 and k is 4"):
        grouped_products([Product(left, right, out, 2.0, addends=(fits,))])


def test_the_truth_is_the_product() -> None:
    rng = random.Random(0)
    assert_right([drawn(rng, 9, 8, 7) for _ in range(20)], grouped_products_reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_types_run_on_plain_torch(dtype: torch.dtype) -> None:
    left, right, out = torch.randn(9, 5).to(dtype), torch.randn(5, 4).to(dtype), torch.zeros(9, 4)
    for into in (out, out.to(dtype)):
        expected = into.double() + 0.5 * left.double() @ right.double()
        grouped_products([Product(left, right, into, 0.5, 1)])
        assert relative(into, expected) < (2e-3 if dtype == torch.float16 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_in_fp32_are_rounded_to_what_they_are_multiplied_with(dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(9, 17).to(dtype), torch.randn(17, 6)
    found, expected = torch.empty(9, 6, dtype=dtype), torch.empty(9, 6, dtype=dtype)
    grouped_products([Product(left, right, found)])
    grouped_products([Product(left, right.to(dtype), expected)])
    assert torch.equal(found, expected)


def test_what_does_not_fit_is_refused() -> None:
    left, right, out = torch.randn(3, 4), torch.randn(4, 5), torch.randn(3, 5)
    for wrong in [(left, right, out.t()), (left, left, out), (left, right, out[0]), (left[:, :3], right, out)]:
        with pytest.raises(ValueError, match="are expected"):
            grouped_products([Product(*wrong)])
    with pytest.raises(ValueError, match="its type or fp32 is expected"):
        grouped_products([Product(left, right.bfloat16(), out)])
    with pytest.raises(ValueError, match="one device is expected"):
        grouped_products([Product(left, right, out.to("meta"))])
    with pytest.raises(ValueError, match="beta is 2"):
        grouped_products([Product(left, right, out, 1.0, 2)])
    if NATIVE:
        with pytest.raises(ValueError, match="no contiguous rows"):
            grouped_products([Product(left, right, torch.randn(5, 3).t())])


@usual_kernels
def test_the_kernel_is_used_and_made_for_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, a kernel that no longer compiles or is never called would pass as plain torch."""
    library = load.compiled("grouped")
    assert library is not None
    assert library.topwork_grouped_level() == (3 if "amx_bf16" in FEATURES else 2 if "avx512_bf16" in FEATURES else 1)
    monkeypatch.setattr(grouped, "_by_torch", None)
    assert_right([drawn(random.Random(0), 8, 8, 8)])


@needs_compiler
def test_older_processors(older_build: OlderBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same source with fewer instructions: bf16 without its own product, narrower vectors."""
    library, level = older_build("grouped")
    assert library.topwork_grouped_level() == level
    monkeypatch.setattr(load, "compiled", lambda _: library)
    rng = random.Random(5)
    torch.manual_seed(5)
    for _ in range(12):
        assert_right([drawn(rng, *(rng.choice((*SIZES, 300)) for _ in range(3))) for _ in range(8)])
    if level == grouped.ON_AMX:
        assert_right([with_addends(rng) for _ in range(30)])


@needs_compiler
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_long_sums_of_few_rows_are_the_same_for_any_number_of_threads(
    dtype: torch.dtype, older_build: OlderBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of A and B: up to 48 rows their columns are cut for the threads, and their sums into shorter blocks."""
    library, _ = older_build("grouped")
    monkeypatch.setattr(load, "compiled", lambda _: library)
    torch.manual_seed(0)
    for rows, k, n in ((1, 129, 16), (16, 130, 97), (48, 257, 300), (49, 257, 300), (16, 64, 576), (33, 1100, 1536)):
        left, right = torch.randn(k, rows).to(dtype), torch.randn(k, n + 8).to(dtype)[:, 3 : 3 + n]
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            product = Product(left.t(), right, torch.full((rows, n), torch.nan))
            assert_right([product])
            results.append(product.out)
        assert all(torch.equal(result, results[0]) for result in results)


def test_without_a_compiler_everything_still_runs() -> None:
    code = (
        "import torch; from topwork.ops.grouped import *; x = torch.ones(5, 4).bfloat16(); out = torch.ones(5, 5);"
        "grouped_products([Product(x, x.t(), out, 0.5, 1)]); assert bool((out == 3).all())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, build.OFF: "1"})
