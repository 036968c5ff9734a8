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


class Product(NamedTuple):
    """out [m, n] = alpha left [m, k] right [k, n], and with beta = 1 what out held before.

    Views are welcome: `out` needs contiguous rows, left and right are copied if neither axis is contiguous. left and
    right have one type, but for fp32 beside 16 bits on the right, which is rounded to these; out has any.
    """

    left: Tensor
    right: Tensor
    out: Tensor
    alpha: float = 1.0
    beta: int = 0


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
    types than the kernels' are given, rounds the product before it is added to an `out` of another type). A sum's
    value depends on its own row and column alone: not on threads, other products, or how many rows there are.
    """
    if not products:
        return
    for product in products:
        _check(product)
    if _native_runs(products) and (library := native.compiled("grouped")) is not None:
        _native(library, products)
    elif kernels := triton.kernels("grouped", products[0].left):
        kernels.staged([products])[0]()
    else:
        for product in products:
            _by_torch(_of_one_type(product))


def rows_stand_alone(near: Tensor) -> bool:
    """Whether products of such values keep the last of these promises: torch.mm's sums depend on how many rows there
    are."""
    return native.kernels("grouped", near) is not None or triton.kernels("grouped", near) is not None


def grouped_products_reference(products: Sequence[Product]) -> None:
    """The same in plain torch: in fp32, rounded once."""
    for left, right, out, alpha, beta in map(_of_one_type, products):
        value = torch.mm(left.float(), right.float()).mul_(alpha)
        out.copy_(value.add_(out) if beta else value)


def _of_one_type(product: Product) -> Product:
    return product._replace(right=product.right.to(product.left.dtype))


def _by_torch(product: Product) -> None:
    left, right, out, alpha, beta = product
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
    left, right, out, _, beta = product
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


def _native_runs(products: Sequence[Product]) -> bool:
    return all(
        left.dtype in native.KINDS and out.dtype in native.KINDS and left.device.type == "cpu"
        for left, _, out, _, _ in products
    )


def _native(library: ctypes.CDLL, products: Sequence[Product]) -> None:
    """The kernel sees bare memory: shapes are checked, strides are here."""
    table, alphas, copies = array("q"), array("d"), []
    on_amx = library.topwork_grouped_level() == ON_AMX
    for left, right, out, alpha, beta in products:
        (m, k), n, (row, column) = left.shape, right.shape[1], out.stride()
        if column != 1 and n > 1:
            raise ValueError(f"out of strides {[row, column]} has no contiguous rows, which are expected")
        if right.dtype != left.dtype and not on_amx:
            right = right.to(left.dtype)
        left, right = _laid_out(left), _laid_out(right)
        copies += [left, right]
        table.extend((
            left.data_ptr(), *_strides(left), right.data_ptr(), *_strides(right), out.data_ptr(), row, 1,
            m, k, n, native.KINDS[left.dtype], native.KINDS[right.dtype], native.KINDS[out.dtype], beta,
        ))  # fmt: skip
        alphas.append(alpha)
    addresses = table.buffer_info()[0], alphas.buffer_info()[0]
    if library.topwork_grouped_products(*addresses, len(products), torch.get_num_threads()):
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
