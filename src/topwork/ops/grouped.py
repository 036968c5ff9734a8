"""Many small matrix products in one call: the low-rank terms of many adapters, each over rows of its own.

    out [m, n] = alpha left [m, k] right [k, n] + beta out

On CPUs a C kernel (native/grouped.c), on GPUs a Triton kernel (triton/grouped.py) takes all of them at once, whatever
their shapes: torch.mm starts each for itself, and oneDNN compiles a kernel for every shape it has not met (0.6 ms and
0.6 MB each), which N adapters with rows of their own never stop bringing. Everything else goes to torch.mm.
"""

import ctypes
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from topwork.ops.native import load as native
from topwork.ops.triton import load as triton

ON_AMX = 3
"""The kernel's level where it multiplies bf16 on AMX, and rounds what is fp32 beside it by itself."""


MOST_ADDENDS, GRID = 126, 16
"""Addends of a product, and where their columns may begin, and end before its own: native/grouped_amx.h."""
MADE_APART, ADD, LINE = 3, 15, 17
"""What the kernel answers where addends cannot join, where their lines say which, and how long a line is."""


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
    kernels = triton.kernels("grouped", products[0].left) if products else None
    if kernels is not None and not all(1 in x.stride() for product in products for x in product[:2]):
        kernels = None  # what has no contiguous axis is copied when it is time
    if any(product.addends for product in products):
        kernels = None  # which know of none
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
    rounded as a product of its own, to which the product is added. A sum's value depends on its own row and column
    alone: not on threads, other products, or how many rows there are.
    """
    if not products:
        return
    for product in products:
        _check(product)
    library = native.compiled("grouped") if _native_runs(products) else None
    on_amx = library is not None and _on_amx(library)
    apart = [_apart(product, on_amx) for product in products]
    if any(apart):
        _in_turns(products, apart)
    elif library is not None:
        if wild := _native(library, products, on_amx):
            _in_turns(products, wild)
    elif kernels := triton.kernels("grouped", products[0].left):
        kernels.staged([products])[0]()
    else:
        for product in products:
            _by_torch(_of_one_type(product))


def multiplies_all(near: Tensor) -> bool:
    """Whether a base's own products are best made here: bf16 on AMX. oneDNN is as fast there, up to a quarter faster at
    some shapes and slower at others (docs/log.md), and compiles a kernel for each that it has not met (5 ms for each
    product of each new length of a batch); here terms are addends, which save a walk through the output, and no sum
    depends on the number of threads, as oneDNN's do."""
    library = native.kernels("grouped", near) if near.dtype == torch.bfloat16 else None
    return library is not None and _on_amx(library)


def multiplied(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left [m, k] right [k, n], written to `out` where given: here where `multiplies_all`, else by torch. (On AMX
    oneDNN 3.12 lets a row of bf16 that is not finite reach the row before it where k is odd.)"""
    if left.dtype == right.dtype and multiplies_all(left):
        out = left.new_empty(left.shape[0], right.shape[1]) if out is None else out
        grouped_products([Product(left, right, out)])
        return out
    return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)


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


def _apart(product: Product, on_amx: bool) -> list[int]:
    """Which of its addends the kernel cannot add to a product's sums."""
    if not (product.addends and on_amx and product.left.dtype == torch.bfloat16):
        return list(range(len(product.addends)))
    joining, apart = 0, []
    for number, addend in enumerate(product.addends):
        end = addend.column + addend.right.shape[1]
        on_grid = addend.column % GRID == 0 and (end % GRID == 0 or end == product.out.shape[1])
        if on_grid and joining < MOST_ADDENDS:
            joining += 1
        else:
            apart.append(number)
    return apart


def _in_turns(products: Sequence[Product], apart: Sequence[Sequence[int]]) -> None:
    """The same with some addends of each as products of their own. They come first, since of what is added to an output
    that is rounded already little would be left."""
    turns: list[list[Product]] = [[] for _ in range(max(map(len, apart)))]
    last = []
    for product, numbers in zip(products, apart):
        if numbers and not product.beta:
            product.out.zero_()
        for turn, number in zip(turns, numbers):
            x = product.addends[number]
            turn.append(Product(x.left, x.right, _part(product.out, x), x.alpha, 1))
        joining = tuple(x for number, x in enumerate(product.addends) if number not in numbers)
        last.append(product._replace(beta=1, addends=joining) if numbers else product)
    for turn in (*turns, last):
        grouped_products(turn)


def _on_amx(library: ctypes.CDLL) -> bool:
    return bool(library.topwork_grouped_level() == ON_AMX)


def _of_one_type(product: Product) -> Product:
    left, right = product.left, product.right
    return product if left.dtype == right.dtype else product._replace(right=right.to(left.dtype))


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
    _check_operands(left, right, out.shape)
    if left.device != out.device:
        raise ValueError(f"out is on {out.device} and left on {left.device}, where one device is expected")
    if beta not in (0, 1):
        raise ValueError(f"beta is {beta}, where 0 (overwrite) or 1 (add) is expected")
    if addends and (alpha != 1 or not left.shape[1]):
        raise ValueError(f"alpha is {alpha} and k is {left.shape[1]}: with addends 1 and more than 0 are expected")
    for addend in addends:
        _check_addend(addend, product)


def _check_addend(addend: Addend, product: Product) -> None:
    left, right, row, column, _ = addend
    if min(row, column) < 0 or left.dtype != product.left.dtype or left.device != product.left.device:
        raise ValueError(
            f"an addend of {left.dtype} on {left.device} at {addend[2:4]} in a product of {product.left.dtype} on "
            f"{product.left.device}"
        )
    rows, columns = product.out.shape
    _check_operands(left, right, (min(left.shape[0], rows - row), min(right.shape[1], columns - column)))


def _check_operands(left: Tensor, right: Tensor, into: tuple[int, ...]) -> None:
    """Whether they can be multiplied into something of this shape."""
    shape, other = left.shape, right.shape
    if len(shape) != 2 or len(other) != 2 or into != (shape[0], other[1]) or shape[1] != other[0]:
        raise ValueError(f"shapes {[*shape]}, {[*other]} into {[*into]}, where [m, k], [k, n] into [m, n] are expected")
    if right.dtype not in (left.dtype, torch.float32):
        raise ValueError(
            f"left is {left.dtype}, right is {right.dtype}, where its type or fp32 is expected; convert it"
        )
    if left.device != right.device:
        raise ValueError(f"left is on {left.device} and right on {right.device}, where one device is expected")


def _native_runs(products: Sequence[Product]) -> bool:
    kinds = native.KINDS
    return all(
        product.left.is_cpu and product.left.dtype in kinds and product.out.dtype in kinds for product in products
    )


def _native(library: ctypes.CDLL, products: Sequence[Product], on_amx: bool) -> list[list[int]]:
    """The kernel sees bare memory: shapes are checked, strides are here. Empty, or of each product which addends have
    to be made apart; then nothing was written."""
    if not on_amx:
        products = [_of_one_type(product) for product in products]
    numbers: list[int] = []
    alphas: list[float] = []
    copies: list[Tensor] = []
    for left, right, out, alpha, beta, addends in products:
        row, column = out.stride()
        if column != 1 and out.shape[1] > 1:
            raise ValueError(f"out of strides {[row, column]} has no contiguous rows, which are expected")
        kind = native.KINDS[out.dtype]
        numbers += _line(left, right, (out.data_ptr(), row, 1), (kind, beta, len(addends)), copies)
        alphas.append(alpha)
        for addend in addends:
            numbers += _line(addend.left, addend.right, (0, addend.row, addend.column), (0, 0, 0), copies)
            alphas.append(addend.alpha)
    table, factors = array("q", numbers), array("d", alphas)
    addresses = table.buffer_info()[0], factors.buffer_info()[0]
    failed = library.topwork_grouped_products(*addresses, len(alphas), torch.get_num_threads())
    if failed == MADE_APART:
        return _marked(products, table[ADD::LINE])
    if failed:
        raise MemoryError(f"no memory for {len(products)} products")
    return []


def _marked(products: Sequence[Product], marks: Iterable[int]) -> list[list[int]]:
    """Which of each product's addends have a mark; its own line comes before theirs."""
    rest, found = iter(marks), []
    for product in products:
        next(rest)
        found.append([number for number in range(len(product.addends)) if next(rest)])
    return found


def _line(
    left: Tensor, right: Tensor, out: tuple[int, int, int], kinds: tuple[int, int, int], copies: list[Tensor]
) -> tuple[int, ...]:
    """A product or an addend as the kernel's table has it."""
    (m, k), n = left.shape, right.shape[1]
    types = native.KINDS[left.dtype], native.KINDS[right.dtype]
    return *_matrix(left, copies), *_matrix(right, copies), *out, m, k, n, *types, *kinds


def _matrix(x: Tensor, copies: list[Tensor]) -> tuple[int, int, int]:
    """Where x is, and its strides, one of them 1: that of an axis of one value may be anything, and is made to fit;
    where neither axis is contiguous (a gradient that was expanded) x is copied."""
    row, column = x.stride()
    rows, columns = x.shape
    if row == 1 or column == 1:
        return x.data_ptr(), row, column
    if columns == 1:
        return x.data_ptr(), row, 1
    if rows == 1:
        return x.data_ptr(), 1, column
    copies.append(x.contiguous())
    return copies[-1].data_ptr(), columns, 1
