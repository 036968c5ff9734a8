"""The kernels of `triton/grouped.py`, which says what a program does, makes the table and launches them."""
# mypy: allow-untyped-defs
# Triton reads a kernel's annotations itself: only `tl.constexpr` may stand there.

import triton
import triton.language as tl

LINE = tl.constexpr(12)
"""Numbers of a product in the table: first tile; tiles across; addresses of left, right and out; the distance of each
one's rows or, where it is turned, columns, in values; m and n packed by two; k; the bits of alpha; packed again how
many rows a piece has and how many pieces there are. Where pieces are added, left is where they are, and the distances
are those of out's rows and columns and nothing."""


@triton.jit
def _line_of(table, count, tile, SEARCH: tl.constexpr):
    """The line of the last product whose first tile is not beyond this one."""
    low = tile * 0
    high = low + count
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        after = tl.load(table + middle * LINE) <= tile
        low = tl.where(after, middle, low)
        high = tl.where(after, high, middle)
    return table + low * LINE


@triton.jit
def _size_and_factor(line):
    """m, n and alpha."""
    packed = tl.load(line + 8)
    m, n = (packed >> 32).to(tl.int32), (packed & 0x7FFFFFFF).to(tl.int32)
    return m, n, tl.load(line + 10).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _tile_at(address, outer, rows, columns, height, width, TYPE: tl.constexpr, TURNED: tl.constexpr,
             ALIGNED: tl.constexpr):  # fmt: skip
    """Pointers of a tile and which of them lie inside a matrix [height, width]."""
    values = address.to(tl.pointer_type(TYPE))
    if ALIGNED:  # so that the compiler knows: a hint would be lost with the function's arguments
        values = tl.multiple_of(values, 16)
        outer = outer // 8 * 8
        if TURNED:  # the contiguous axis ends at a multiple too: else its mask would split every access
            height = height // 8 * 8
        else:
            width = width // 8 * 8
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    if TURNED:
        at = values + columns.to(tl.int64)[None, :] * outer + rows[:, None]
    else:
        at = values + rows.to(tl.int64)[:, None] * outer + columns[None, :]
    return at, inside


@triton.jit(do_not_specialize=["count"])
def multiply_grouped(
    table, count,
    TYPE: tl.constexpr, RIGHT_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr, OUT_TYPE: tl.constexpr,
    LEFT_TURNED: tl.constexpr, RIGHT_TURNED: tl.constexpr, OUT_TURNED: tl.constexpr, ADD: tl.constexpr,
    CUT: tl.constexpr, ALIGNED: tl.constexpr, SEARCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """With CUT, `out` is fp32 [pieces, m, n], and a program sums the steps of one piece."""
    tile = tl.program_id(0).to(tl.int64)
    line = _line_of(table, count, tile, SEARCH)
    tile -= tl.load(line)
    m, n, alpha = _size_and_factor(line)
    first, stop = 0, tl.load(line + 9).to(tl.int32)
    left, right, out = tl.load(line + 2), tl.load(line + 3), tl.load(line + 4)
    if CUT:
        pieces, length = tl.load(line + 11) & 0x7FFFFFFF, (tl.load(line + 11) >> 32).to(tl.int32) // 64 * 64
        out += (tile % pieces) * m * n * 4
        first = (tile % pieces).to(tl.int32) * length
        stop = tl.minimum(stop, first + length)
        tile = tile // pieces
    across = tl.load(line + 1)
    rows = ((tile // across) * ROWS).to(tl.int32) + tl.arange(0, ROWS)
    columns = ((tile % across) * COLUMNS).to(tl.int32) + tl.arange(0, COLUMNS)

    left_outer, right_outer, out_outer = tl.load(line + 5), tl.load(line + 6), tl.load(line + 7)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, stop, STEPS):
        steps = start + tl.arange(0, STEPS)
        at, inside = _tile_at(left, left_outer, rows, steps, m, stop, TYPE, LEFT_TURNED, ALIGNED)
        a = tl.load(at, mask=inside, other=0.0)
        at, inside = _tile_at(right, right_outer, steps, columns, stop, n, RIGHT_TYPE, RIGHT_TURNED, ALIGNED)
        b = tl.load(at, mask=inside, other=0.0).to(TYPE)
        sums = tl.dot(a.to(DOT_TYPE), b.to(DOT_TYPE), sums, input_precision="ieee")

    at, inside = _tile_at(out, out_outer, rows, columns, m, n, OUT_TYPE, OUT_TURNED, ALIGNED)
    if not CUT:
        sums *= alpha
    if ADD:
        sums += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, sums.to(OUT_TYPE), mask=inside)


@triton.jit(do_not_specialize=["count"])
def add_pieces(
    table, count, OUT_TYPE: tl.constexpr, ADD: tl.constexpr, SEARCH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """out [m, n] = alpha times the sum over fp32 [pieces, m, n] at `left`, and with ADD what it held."""
    tile = tl.program_id(0).to(tl.int64)
    line = _line_of(table, count, tile, SEARCH)
    m, n, alpha = _size_and_factor(line)
    size = m.to(tl.int64) * n
    at = (tile - tl.load(line)) * VALUES + tl.arange(0, VALUES)
    inside = at < size
    parts = tl.load(line + 2).to(tl.pointer_type(tl.float32)) + at
    sums = tl.zeros([VALUES], tl.float32)
    for piece in range(tl.load(line + 11) & 0x7FFFFFFF):
        sums += tl.load(parts + piece * size, mask=inside, other=0.0)
    sums *= alpha
    place = (at // n) * tl.load(line + 5) + (at % n) * tl.load(line + 6)
    out = tl.load(line + 4).to(tl.pointer_type(OUT_TYPE)) + place
    if ADD:
        sums += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, sums.to(OUT_TYPE), mask=inside)
