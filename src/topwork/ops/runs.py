"""Products of rows that are sorted into runs, each run with a matrix of its own: experts, and adapters' small matrices
of experts.

    out[run e] = alpha left[run e] right[e] + beta out[run e]        `RunProduct`
    out[e]     = alpha left[run e]' right[run e]                     `RunOuter`, zeros for a run without rows

Plain torch goes from run to run, and is the truth. On CPUs the kernel of `ops/grouped.py` takes all runs of all
products in one call: its table of addresses is computed for all of them at once, so that no Python goes through them.
On GPUs torch's own product of groups does as much for runs that are all rows: those of one adapter.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork.ops.native import load as native

GROUPED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of which torch's own product of runs is."""


class Runs(NamedTuple):
    """Run e is the rows starts[e] : starts[e] + counts[e]. Both [E] int64; `whole` where these are all rows, one run
    behind the other."""

    starts: Tensor
    counts: Tensor
    whole: bool = False


class RunProduct(NamedTuple):
    """left [S, k], right [E, k, n] and out [S, n], of which only rows in runs are read and written; beta 0 or 1. One of
    the last two axes of right is contiguous, and rows are. left and right have one type, out any."""

    left: Tensor
    right: Tensor
    out: Tensor
    runs: Runs
    alpha: float = 1.0
    beta: int = 0


class RunOuter(NamedTuple):
    """left [S, m], right [S, n] and out [E, m, n], whose rows are contiguous."""

    left: Tensor
    right: Tensor
    out: Tensor
    runs: Runs
    alpha: float = 1.0


Product = RunProduct | RunOuter


def run_products(products: Sequence[Product]) -> None:
    """Writes every product's `out`; none may overlap another or an operand. Sums are fp32, times alpha, plus what `out`
    held, rounded once; plain torch in 16 bits rounds the product before it is added."""
    for product in products:
        _check(product)
    library = native.compiled("grouped") if products and all(map(_native_knows, products)) else None
    if library is not None:
        _native(library, products)
        return
    for product in products:
        if product.left.is_cuda and product.runs.whole and _has_grouped(product.left):
            by_torch(product)
        else:
            run_products_reference([product])


def run_products_reference(products: Sequence[Product]) -> None:
    """The truth, run by run."""
    for product in products:
        left, right, out, runs, alpha = product[:5]
        for e, (start, count) in enumerate(zip(runs.starts.tolist(), runs.counts.tolist())):
            rows = slice(start, start + count)
            if isinstance(product, RunOuter):
                out[e] = alpha * (left[rows].t() @ right[rows])
            elif count:
                value = alpha * (left[rows] @ right[e])
                out[rows] = out[rows] + value if product.beta else value.to(out.dtype)


def sorted_products(left: Tensor, right: Tensor, stops: Tensor) -> Tensor:
    """left [S, k] times right [E, k, n] -> [S, n], where run e ends at stops[e] ([E] int32) and the next one begins
    there, and all rows are in runs. torch's own, which is made for large matrices, where it can."""
    if left.dtype in GROUPED_TYPES and left.dtype == right.dtype and _has_grouped(left) and _aligned(left, right):
        return F.grouped_mm(left, right, offs=stops)
    out = left.new_empty(left.shape[0], right.shape[2])
    counts = torch.diff(stops, prepend=stops.new_zeros(1)).long()
    runs = Runs(stops.long() - counts, counts)
    run_products([RunProduct(left, right.to(left.dtype), out, runs)])
    return out


def by_torch(product: Product) -> None:
    """One of all rows, by torch's product of groups; its operands' rows begin at multiples of 16 bytes."""
    left, right, out, (starts, counts, _), alpha = product[:5]
    stops = (starts + counts).to(torch.int32)
    if isinstance(product, RunOuter):
        both = F.grouped_mm(_widened(left).t(), _widened(right), offs=stops)
        out.copy_(both[:, : out.shape[1], : out.shape[2]]).mul_(alpha)
        return
    wide = _widened(F.pad(right, (0, 0, 0, -right.shape[1] % 8)))
    value = F.grouped_mm(_widened(left), wide, offs=stops)[:, : out.shape[1]]
    if product.beta:
        out.add_(value, alpha=alpha)
    else:
        out.copy_(value).mul_(alpha)


def _widened(x: Tensor) -> Tensor:
    """Contiguous, with zeros behind its last axis up to a multiple of 8."""
    return F.pad(x, (0, -x.shape[-1] % 8)).contiguous()


def _has_grouped(near: Tensor) -> bool:
    return not near.is_cuda or torch.cuda.get_device_capability(near.device) >= (8, 0)


def _aligned(*operands: Tensor) -> bool:
    """Whether rows and matrices begin at multiples of 16 bytes, as torch wants it."""
    return all(stride == 1 or stride * x.element_size() % 16 == 0 for x in operands for stride in x.stride())


def _check(product: Product) -> None:
    left, right, out, runs, _ = product[:5]
    count = len(runs.starts)
    if isinstance(product, RunOuter):
        fits = out.shape == (count, left.shape[1], right.shape[1]) and len(left) == len(right)
    else:
        fits = right.shape == (count, left.shape[1], out.shape[1]) and len(left) == len(out)
    if not fits or len(runs.counts) != count:
        shapes = [list(x.shape) for x in (left, right, out, runs.starts, runs.counts)]
        raise ValueError(f"left, right, out and runs are {shapes}, which do not fit one another")


def _native_knows(product: Product) -> bool:
    left, right, out = product[:3]
    known = all(x.is_cpu and x.dtype in native.KINDS for x in (left, right, out)) and left.dtype == right.dtype
    rows = left.stride(1) == out.stride(-1) == 1 or 0 in left.shape
    return known and rows and (right.stride(1) == 1 if right.dim() == 2 else 1 in _sides(right))


def _native(library: ctypes.CDLL, products: Sequence[Product]) -> None:
    table = torch.cat([_lines(product) for product in products])
    alphas = [torch.full((len(p.runs.starts),), p.alpha, dtype=torch.float64) for p in products]
    alpha = torch.cat(alphas)
    if library.topwork_grouped_products(table.data_ptr(), alpha.data_ptr(), len(table), torch.get_num_threads()):
        raise MemoryError(f"no memory for {len(table)} products")


def _lines(product: Product) -> Tensor:
    """[E, 17] int64, the lines of `native/grouped.c`'s table: address, strides of rows and columns of left, right and
    out; m, k, n; kinds of both operands and of the output; whether to add; no addends."""
    left, right, out, (starts, counts, _), _ = product[:5]
    experts = torch.arange(len(starts))
    kinds = native.KINDS[left.dtype], native.KINDS[right.dtype], native.KINDS[out.dtype]

    def row(x: Tensor) -> Tensor:
        return x.data_ptr() + starts * (x.stride(0) * x.element_size())

    def one(x: Tensor) -> Tensor:
        return x.data_ptr() + experts * (x.stride(0) * x.element_size())

    columns: list[Tensor | int]
    if isinstance(product, RunOuter):
        columns = [
            row(left), 1, left.stride(0), row(right), right.stride(0), 1, one(out), out.stride(1), 1,
            left.shape[1], counts, right.shape[1], *kinds, 0, 0,
        ]  # fmt: skip
    else:
        columns = [
            row(left), left.stride(0), 1, one(right), *_sides(right), row(out), out.stride(0), 1,
            counts, right.shape[1], right.shape[2], *kinds, product.beta, 0,
        ]  # fmt: skip
    lines = torch.empty(len(starts), len(columns), dtype=torch.int64)
    for at, value in enumerate(columns):
        lines[:, at] = value
    return lines


def _sides(right: Tensor) -> tuple[int, int]:
    """Strides of a stack's rows and columns, one of them 1; that of an axis of one value may be anything."""
    _, rows, columns = right.stride()
    if rows == 1 or columns == 1:
        return rows, columns
    if right.shape[1] == 1:
        return 1, columns
    return (rows, 1) if right.shape[2] == 1 else (rows, columns)
