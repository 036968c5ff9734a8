"""Many small products on the GPU in one launch over a table of them; formula and contract: `ops/grouped.py`.

A program makes one tile of one product: it finds the product by its tiles' numbers in the table. Products of one launch
have the same types and the same contiguous axes, so that these are known when it is compiled; the products of a stage
of LoRA do, and others take a launch for each kind. fp32 is multiplied as fp32, not as TF32.
"""
# mypy: allow-untyped-defs
# Triton reads a kernel's annotations itself: only `tl.constexpr` may stand there.

from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from topwork.ops.grouped import Product

LINE = tl.constexpr(10)
"""Numbers of a product in the table: first tile, tiles across, addresses of left, right and out, the distance of each
one's rows or, where it is turned, columns, in values, and m, n, k packed by two and one."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""The interpreter multiplies the bits of bf16 as whole numbers: it is given fp32."""


@triton.jit
def _tile_at(address, outer, rows, columns, height, width, TYPE: tl.constexpr, TURNED: tl.constexpr,
             ALIGNED: tl.constexpr):  # fmt: skip
    """Pointers of a tile and which of them lie inside a matrix [height, width]."""
    values = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        values = tl.multiple_of(values, 16)
        outer = tl.multiple_of(outer, 8)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    if TURNED:
        at = values + columns.to(tl.int64)[None, :] * outer + rows[:, None]
    else:
        at = values + rows.to(tl.int64)[:, None] * outer + columns[None, :]
    return at, inside


@triton.jit
def _grouped_products(
    table, factors, count,
    TYPE: tl.constexpr, DOT_TYPE: tl.constexpr, OUT_TYPE: tl.constexpr, LEFT_TURNED: tl.constexpr,
    RIGHT_TURNED: tl.constexpr, OUT_TURNED: tl.constexpr, ADD: tl.constexpr, ALIGNED: tl.constexpr,
    SEARCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    low = tile * 0
    high = low + count
    for _ in tl.static_range(SEARCH):  # the last product whose first tile is not beyond this one
        middle = (low + high) // 2
        after = tl.load(table + middle * LINE) <= tile
        low = tl.where(after, middle, low)
        high = tl.where(after, high, middle)
    line = table + low * LINE
    across = tl.load(line + 1)
    m = (tl.load(line + 8) >> 32).to(tl.int32)
    n = (tl.load(line + 8) & 0x7FFFFFFF).to(tl.int32)
    k = tl.load(line + 9).to(tl.int32)
    tile -= tl.load(line)
    rows = ((tile // across) * ROWS).to(tl.int32) + tl.arange(0, ROWS)
    columns = ((tile % across) * COLUMNS).to(tl.int32) + tl.arange(0, COLUMNS)

    left, right, out = tl.load(line + 2), tl.load(line + 3), tl.load(line + 4)
    left_outer, right_outer, out_outer = tl.load(line + 5), tl.load(line + 6), tl.load(line + 7)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, k, STEPS):
        steps = start + tl.arange(0, STEPS)
        at, inside = _tile_at(left, left_outer, rows, steps, m, k, TYPE, LEFT_TURNED, ALIGNED)
        a = tl.load(at, mask=inside, other=0.0)
        at, inside = _tile_at(right, right_outer, steps, columns, k, n, TYPE, RIGHT_TURNED, ALIGNED)
        b = tl.load(at, mask=inside, other=0.0)
        sums = tl.dot(a.to(DOT_TYPE), b.to(DOT_TYPE), sums, input_precision="ieee")

    sums *= tl.load(factors + low)
    at, inside = _tile_at(out, out_outer, rows, columns, m, n, OUT_TYPE, OUT_TURNED, ALIGNED)
    if ADD:
        sums += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, sums.to(OUT_TYPE), mask=inside)


def grouped_products(products: Sequence[Product]) -> None:
    """Every product's `out`; checked by the caller. Views without a contiguous axis are copied, as out is."""
    kinds: dict[tuple[object, ...], list[Product]] = defaultdict(list)
    copied: list[tuple[torch.Tensor, torch.Tensor]] = []
    for product in products:
        left, right, out, alpha, beta = product
        if not out.numel():
            continue
        left, right = (x if 1 in x.stride() else x.contiguous() for x in (left, right))
        if out.stride(1) != 1:
            copied.append((out, out.contiguous()))
            out = copied[-1][1]
        if left.stride(1) != 1 and right.stride(1) == 1 and left.shape[0] > right.shape[1]:
            left, right, out = right.t(), left.t(), out.t()  # the longer side across, whose tiles are wider
        turned = tuple(x.stride(1) != 1 for x in (left, right, out))
        kinds[left.dtype, out.dtype, *turned, beta].append(Product(left, right, out, alpha, beta))
    for kind in kinds.values():
        _launch(kind)
    for target, result in copied:
        target.copy_(result)


def tile_of(products: Sequence[Product]) -> tuple[int, int, int]:
    """Rows, columns and steps of a launch's tiles: of the largest product, within what registers hold."""
    tall, wide = (max(product.out.shape[axis] for product in products) for axis in (0, 1))
    deep = max(product.left.shape[1] for product in products)
    rows, columns = (min(64, max(16, triton.next_power_of_2(x))) for x in (tall, wide))
    return rows, columns, min(64, max(16, triton.next_power_of_2(deep)))


def _launch(products: Sequence[Product]) -> None:
    """Products of one kind: types, contiguous axes, and whether to add."""
    rows, columns, steps = tile_of(products)
    lines, tiles, aligned = [], 0, True
    for left, right, out, _, _ in products:
        (m, k), n = left.shape, right.shape[1]
        across = triton.cdiv(n, columns)
        outers = [x.stride(1) if x.stride(1) != 1 else x.stride(0) for x in (left, right, out)]
        addresses = [x.data_ptr() for x in (left, right, out)]
        aligned &= all(at % 16 == 0 for at in addresses) and all(outer % 8 == 0 for outer in outers)
        lines.append([tiles, across, *addresses, *outers, (m << 32) | n, k])
        tiles += triton.cdiv(m, rows) * across
    first, device = products[0], products[0].out.device
    kind = TYPES[first.left.dtype]
    turned = [x.stride(1) != 1 for x in first[:3]]
    table = torch.tensor(lines, dtype=torch.int64).to(device, non_blocking=True)
    factors = torch.tensor([product.alpha for product in products]).to(device, non_blocking=True)
    with torch.cuda.device_of(first.out):
        _grouped_products[(tiles,)](
            table, factors, len(products),
            TYPE=kind, DOT_TYPE=tl.float32 if INTERPRETED else kind, OUT_TYPE=TYPES[first.out.dtype],
            LEFT_TURNED=turned[0], RIGHT_TURNED=turned[1], OUT_TURNED=turned[2], ADD=bool(first.beta), ALIGNED=aligned,
            SEARCH=len(products).bit_length(), ROWS=rows, COLUMNS=columns, STEPS=steps, num_warps=4,
        )  # fmt: skip
