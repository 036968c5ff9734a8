"""Products of rows in runs: the C kernel, and torch's own, against products run by run in float64."""

import pytest
import torch
from torch import Tensor

from reference.measure import relative
from topwork.ops.runs import (
    Product,
    RunOuter,
    RunProduct,
    Runs,
    by_torch,
    run_products,
    run_products_reference,
    sorted_products,
)

TYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
COUNTS = [3, 0, 5, 1, 13]
SIDES = [(1, 1), (5, 3), (16, 4), (33, 17)]


def runs_of(counts: list[int], every: int = 1, at: int = 0) -> Runs:
    """Every so-manieth of these, as an adapter among others has them."""
    whole = torch.tensor(counts)
    starts = whole.cumsum(0) - whole
    return Runs(starts[at::every].contiguous(), whole[at::every].contiguous())


def exactly(product: Product) -> Tensor:
    """In float64."""
    left, right, out = product.left.double(), product.right.double(), product.out.double()
    for e, (start, count) in enumerate(zip(product.runs.starts.tolist(), product.runs.counts.tolist())):
        rows = slice(start, start + count)
        if isinstance(product, RunOuter):
            out[e] = product.alpha * left[rows].t() @ right[rows]
        else:
            out[rows] = product.alpha * left[rows] @ right[e] + product.beta * out[rows]
    return out


def products(dtype: torch.dtype, k: int, n: int) -> list[Product]:
    """Right sides that lie both ways, an output that is part of a wider one, outputs with their own rows apart."""
    torch.manual_seed(0)
    count, rows = len(COUNTS), sum(COUNTS)
    left, wide = torch.randn(rows, k).to(dtype), torch.randn(rows, n + 4).to(dtype)
    plain, turned = torch.randn(count, k, n).to(dtype), torch.randn(count, n, k).to(dtype).transpose(1, 2)
    across = torch.randn(k, count, n).to(dtype).transpose(0, 1)
    outer = torch.empty(n, count, k).transpose(0, 1)
    return [
        RunProduct(left, plain, torch.zeros(rows, n, dtype=dtype), runs_of(COUNTS)),
        RunProduct(left, turned, wide[:, :n], runs_of(COUNTS), 0.5, 1),
        RunProduct(left, across[1::2], wide.clone()[:, 2 : n + 2], runs_of(COUNTS, 2, 1), 2.0, 1),
        RunOuter(wide.clone()[:, :n], left, outer, runs_of(COUNTS), 3.0),
        RunOuter(left, wide.clone()[:, 1 : n + 1], torch.empty(count, k, n), runs_of(COUNTS)),
    ]


@pytest.mark.parametrize("run", [run_products, run_products_reference], ids=["kernel", "plain"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sides", SIDES)
def test_they_are_what_they_are_run_by_run(sides: tuple[int, int], dtype: torch.dtype, run: object) -> None:
    made = products(dtype, *sides)
    expected = [exactly(product) for product in made]
    run(made)  # type: ignore[operator]
    for product, value in zip(made, expected):
        assert relative(product.out, value) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sides", SIDES)
def test_as_a_gpu_multiplies_them(sides: tuple[int, int], dtype: torch.dtype) -> None:
    """torch's product of groups is the same on every device."""
    for product in products(dtype, *sides):
        if len(product.runs.starts) == len(COUNTS):
            expected = exactly(product)
            by_torch(product)
            assert relative(product.out, expected) < 2 * ROUNDING[dtype]


def test_rows_outside_of_runs_stay_as_they_are() -> None:
    out = torch.full((sum(COUNTS), 4), torch.nan)
    run_products([RunProduct(torch.randn(sum(COUNTS), 3), torch.randn(2, 3, 4), out, runs_of(COUNTS, 2, 1))])
    touched = torch.tensor([False] * 3 + [False] * 5 + [True] + [False] * 13)
    assert torch.equal(~out.isnan().any(1), touched)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64])
def test_sorted_rows_are_torchs_own(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(sum(COUNTS), 16).to(dtype), torch.randn(len(COUNTS), 8, 16).to(dtype).transpose(1, 2)
    stops = torch.tensor(COUNTS).cumsum(0).to(torch.int32)
    found = sorted_products(left, right, stops)
    own = RunProduct(left, right, torch.zeros(sum(COUNTS), 8, dtype=dtype), runs_of(COUNTS))
    assert relative(found, exactly(own)) < ROUNDING.get(dtype, 1e-14)


def test_shapes_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="do not fit one another"):
        run_products([RunProduct(torch.randn(4, 3), torch.randn(2, 5, 4), torch.empty(4, 4), runs_of([2, 2]))])
