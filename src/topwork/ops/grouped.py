"""Many small matrix products in one call: the low-rank terms of many adapters, each over rows of its own.

    out [m, n] = alpha left [m, k] right [k, n] + beta out

On CPUs a C kernel (native/grouped.c), on GPUs a Triton kernel (triton/grouped.py) takes all of them at once, whatever
their shapes: torch.mm starts each for itself, and oneDNN compiles a kernel for every shape it has not met (0.6 ms and
0.6 MB each), which N adapters with rows of their own never stop bringing. Everything else goes to torch.mm.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from topwork.ops.native import load as native
from topwork.ops.triton import load as triton

ON_AMX = 3
"""The kernel's level where it multiplies bf16 on AMX, and rounds what is fp32 beside it by itself."""


MOST_ADDENDS, GRID = 30, 16
"""Addends of a product, and where their columns may begin: native/grouped_amx.h."""


class Addend(NamedTuple):
    """alpha left [m, k] right [k, n], added to a product's out from (row, column) on."""

    left: Tensor
    right: Tensor
    row: int
    column: int
    alpha: float = 1.0


class Product(NamedTuple):
    """out [m, n] = alpha left [m, k] right [k, n], and with beta = 1 what out held before, and the addends.

    Views are welcome: `out` needs contiguous rows, left and right are copied if neither axis is contiguous. left and
    right have one type, but for fp32 beside 16 bits on the right, which is rounded to these; out has any.
    """

    left: Tensor
    right: Tensor
    out: Tensor
    alpha: float = 1.0
    beta: int = 0
    addends: tuple[Addend, ...] = ()


Stage = Callable[[], None]


def staged(stages: Sequence[Sequence[Product]]) -> list[Stage]:
    """`grouped_products` of each stage, to be called one after the other, once: later ones may read what earlier ones
    wrote. A GPU is told of all of them in one copy."""
    products = [product for stage in stages for product in stage]
    plain = all(1 in x.stride() for product in products for x in product[:2])  # the others are copied when it is time
    kernels = triton.kernels("grouped", products[0].left) if products and plain else None
    if kernels is None or (_native_runs(products) and native.compiled("grouped") is not None):
        return [partial(grouped_products, stage) for stage in stages]
    for product in products:
        _check(product)
    found: list[Stage] = kernels.staged(stages)
    return found


def grouped_products(products: Sequence[Product]) -> None:
    """Writes every product's `out`. No output may overlap another or an operand.

    Sums are fp32, times alpha, plus what `out` held, and rounded once to `out`'s type (torch.mm on 16 bits, where other
    types than the kernels' are given, rounds the product before it is added to an `out` of another type). So are
    addends with the sums that they join on AMX, where their alpha is rounded into their right side; elsewhere each is
    rounded as a product of its own. A sum's value depends on its own row and column alone: not on threads, other
    products, or how many rows there are.
    """
    if not products:
        return
    for product in products:
        _check(product)
    library = native.compiled("grouped") if _native_runs(products) else None
    if any(product.addends and not (library and _joins(library, product)) for product in products):
        for turn in _without_addends(products):
            grouped_products(turn)
    elif library is not None:
        _native(library, products)
    elif kernels := triton.kernels("grouped", products[0].left):
        kernels.staged([products])[0]()
    else:
        for product in products:
            _by_torch(_of_one_type(product))


def multiplies_all(near: Tensor) -> bool:
    """Whether a base's own products are best made here: bf16 on AMX. oneDNN is up to a quarter faster there, once it
    has compiled a kernel for a shape (5 ms for each product of each new length of a batch); here terms are addends,
    which save a walk through the output, and no sum depends on the number of threads, as oneDNN's do."""
    library = native.kernels("grouped", near) if near.dtype == torch.bfloat16 else None
    return library is not None and bool(library.topwork_grouped_level() == ON_AMX)


def rows_stand_alone(near: Tensor) -> bool:
    """Whether products of such values keep the last of these promises: torch.mm's sums depend on how many rows there
    are."""
    return native.kernels("grouped", near) is not None or triton.kernels("grouped", near) is not None


def grouped_products_reference(products: Sequence[Product]) -> None:
    """The same in plain torch: in fp32, rounded once."""
    for left, right, out, alpha, beta, addends in map(_of_one_type, products):
        value = torch.mm(left.float(), right.float()).mul_(alpha)
        for addend in addends:
            term = torch.mm(addend.left.float(), addend.right.to(left.dtype).float())
            _part(value, addend).add_(term, alpha=addend.alpha)
        out.copy_(value.add_(out) if beta else value)


def _part(out: Tensor, addend: Addend) -> Tensor:
    """What of out an addend is added to."""
    return out[addend.row : addend.row + len(addend.left), addend.column : addend.column + addend.right.shape[1]]


def _without_addends(products: Sequence[Product]) -> list[list[Product]]:
    """The same as lists of products alone, to be made one list after the other."""
    turns = [[product._replace(addends=()) for product in products]]
    for number in range(max(len(product.addends) for product in products)):
        there = [(product.out, product.addends[number]) for product in products if len(product.addends) > number]
        turns.append([Product(x.left, x.right, _part(out, x), x.alpha, 1) for out, x in there])
    return turns


def _joins(library: ctypes.CDLL, product: Product) -> bool:
    """Whether the kernel adds a product's addends to its sums."""
    plain = product.left.dtype == torch.bfloat16 and len(product.addends) <= MOST_ADDENDS
    on_grid = all(addend.column % GRID == 0 for addend in product.addends)
    return plain and on_grid and bool(library.topwork_grouped_level() == ON_AMX)


def _of_one_type(product: Product) -> Product:
    return product._replace(right=product.right.to(product.left.dtype))


def _by_torch(product: Product) -> None:
    left, right, out, alpha, beta, _ = product
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=beta, alpha=alpha, out=out)
        return
    tall = left.shape[0] > right.shape[1]  # the longer side on the right, where all libraries like it
    value = torch.mm(right.t(), left.t()).t() if tall else torch.mm(left, right)
    if beta:
        out.add_(value, alpha=alpha)
    else:
        out.copy_(value).mul_(alpha)


def _check(product: Product) -> None:
    left, right, out, alpha, beta, addends = product
    shape, other, into = left.shape, right.shape, out.shape
    if len(shape) != 2 or len(other) != 2 or into != (shape[0], other[1]) or shape[1] != other[0]:
        raise ValueError(f"shapes {[*shape]}, {[*other]} into {[*into]}, where [m, k], [k, n] into [m, n] are expected")
    if right.dtype not in (left.dtype, torch.float32):
        raise ValueError(
            f"left is {left.dtype}, right is {right.dtype}, where its type or fp32 is expected; convert it"
        )
    if not left.device == right.device == out.device:
        places = [str(x.device) for x in (left, right, out)]
        raise ValueError(f"left, right and out are on {places}, where one device is expected")
    if beta not in (0, 1):
        raise ValueError(f"beta is {beta}, where 0 (overwrite) or 1 (add) is expected")
    if addends and (alpha != 1 or not shape[1]):
        raise ValueError(f"alpha is {alpha} and k is {shape[1]}: with addends 1 and more than 0 are expected")
    for addend in addends:
        if min(addend.row, addend.column) < 0 or addend.left.dtype != left.dtype:
            raise ValueError(f"an addend of {addend.left.dtype} at {addend[2:4]} in a product of {left.dtype}")
        _check(Product(addend.left, addend.right, _part(out, addend), addend.alpha))


def _native_runs(products: Sequence[Product]) -> bool:
    return all(
        product.left.dtype in native.KINDS and product.out.dtype in native.KINDS and product.left.device.type == "cpu"
        for product in products
    )


def _native(library: ctypes.CDLL, products: Sequence[Product]) -> None:
    """The kernel sees bare memory: shapes are checked, strides are here."""
    table, alphas, copies = array("q"), array("d"), []
    on_amx = library.topwork_grouped_level() == ON_AMX

    def line(left: Tensor, right: Tensor, out: tuple[int, int, int], *kinds: int) -> None:
        if right.dtype != left.dtype and not on_amx:
            right = right.to(left.dtype)
        left, right = _laid_out(left), _laid_out(right)
        copies.append((left, right))
        table.extend((
            left.data_ptr(), *_strides(left), right.data_ptr(), *_strides(right), *out, *left.shape, right.shape[1],
            native.KINDS[left.dtype], native.KINDS[right.dtype], *kinds,
        ))  # fmt: skip

    for left, right, out, alpha, beta, addends in products:
        row, column = out.stride()
        if column != 1 and out.shape[1] > 1:
            raise ValueError(f"out of strides {[row, column]} has no contiguous rows, which are expected")
        line(left, right, (out.data_ptr(), row, 1), native.KINDS[out.dtype], beta, len(addends))
        for addend in addends:
            line(addend.left, addend.right, (0, addend.row, addend.column), 0, 0, 0)
        alphas.extend((alpha, *(addend.alpha for addend in addends)))
    addresses = table.buffer_info()[0], alphas.buffer_info()[0]
    if library.topwork_grouped_products(*addresses, len(alphas), torch.get_num_threads()):
        raise MemoryError(f"no memory for {len(products)} products")


def _laid_out(x: Tensor) -> Tensor:
    """x, copied where neither axis is contiguous (a gradient that was expanded)."""
    return x if 1 in x.stride() or 1 in x.shape else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    """Of rows and columns, one of them 1; that of an axis of one value may be anything, and is made to fit."""
    row, column = x.stride()
    if row == 1 or column == 1:
        return row, column
    return (row, 1) if x.shape[1] == 1 else (1, column)
