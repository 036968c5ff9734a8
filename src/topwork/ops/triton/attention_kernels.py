"""The kernels of `triton/attention.py`, which says what a program does and launches them.

Scores are in units of log 2 (exp2 is what the chip has). Only blocks that the diagonal, the window's edge or the end of
a sequence crosses are masked. Sums are fp32; 16-bit operands go to the tensor cores, fp32 is multiplied as fp32.
Offsets are 64 bits wide from a block on; within a tile (at most 128 rows) 32 bits hold them. Strides are in units of
UNIT values, heads of SIZE (values: SIZE_V) values are padded to WIDTH in registers, DOT is the type that is multiplied.
"""
# mypy: allow-untyped-defs
# Triton reads a kernel's annotations itself: only `tl.constexpr` may stand there.

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LINE = tl.constexpr(4)
"""Numbers of a block in the table: where its sequence starts, how long that is, the block's first row in it, the first
row of the block that is as far from the sequence's end."""


@triton.jit
def _tile(base, stride, limit, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHECKED: tl.constexpr):
    """[ROWS, WIDTH]: heads of `SIZE` values, zeros behind them and, where checked, from row `limit` on."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = base + row[:, None] * stride + column[None, :]
    if CHECKED and SIZE < WIDTH:
        tile = tl.load(at, mask=(row < limit)[:, None] & (column < SIZE)[None, :], other=0.0)
    elif CHECKED:
        tile = tl.load(at, mask=(row < limit)[:, None], other=0.0)
    elif SIZE < WIDTH:
        tile = tl.load(at, mask=(column < SIZE)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _put(base, stride, limit, value, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = base + row[:, None] * stride + column[None, :]
    keep = (row < limit)[:, None]
    if SIZE < WIDTH:
        keep = keep & (column < SIZE)[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=keep)


@triton.jit
def _capped(products, scale, cap, CAPPED: tl.constexpr):
    """(scores in units of log 2, the slope of the cap)."""
    if CAPPED:
        e = tl.exp2(tl.abs(products) * (tl.abs(scale) / cap * (-2.0 * LOG2E)))
        t = (1.0 - e) / (1.0 + e)  # tanh
        t = tl.where((products < 0.0) == (scale < 0.0), t, -t)
        scores, slope = t * (cap * LOG2E), 1.0 - t * t
    else:
        scores, slope = products * (scale * LOG2E), 1.0
    return scores, slope


@triton.jit
def _seen(rows, columns, window, WINDOW: tl.constexpr):
    """Which keys (columns) a query (row) sees."""
    seen = columns <= rows
    if WINDOW:
        seen = seen & (columns > rows - window)
    return seen


@triton.jit
def _key_spans(first, length, window, WINDOW: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr):
    """Where keys begin that a block of queries meets; where those that all of it sees begin and end; where all end."""
    low = first * 0
    whole = low
    if WINDOW:
        low = tl.maximum(first - window + 1, 0) // STEP * STEP
        whole = tl.minimum(tl.cdiv(tl.maximum(first + OWN - window, 0), STEP) * STEP, first)
    return low, whole, first, tl.minimum(first + OWN, length)


@triton.jit
def _attend_span(
    sums, total, top, q, key, k_row, value, v_row, begin, first, length, low, high, scale, cap, window,
    SIZE: tl.constexpr, SIZE_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, OWN: tl.constexpr,
    STEP: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys from `low` to `high`: sums of values, total and greatest of the shares so far."""
    for start in range(low, high, STEP):
        at = begin + start
        k = _tile(key + at * k_row, k_row, length - start, SIZE, WIDTH, STEP, MASKED)
        products = tl.dot(q, tl.trans(k).to(DOT), input_precision="ieee")
        scores, _ = _capped(products, scale, cap, CAPPED)
        if MASKED:
            rows, columns = first + tl.arange(0, OWN)[:, None], start + tl.arange(0, STEP)[None, :]
            scores = tl.where(_seen(rows, columns, window, WINDOW), scores, float("-inf"))
        greatest = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(greatest == float("-inf"), 0.0, greatest)  # a row that sees nothing yet
        shares = tl.exp2(scores - base[:, None])
        less = tl.exp2(top - base)
        v = _tile(value + at * v_row, v_row, length - start, SIZE_V, WIDTH_V, STEP, MASKED)
        total = total * less + tl.sum(shares, 1)
        sums = tl.dot(shares.to(v.dtype).to(DOT), v.to(DOT), sums * less[:, None], input_precision="ieee")
        top = greatest
    return sums, total, top


@triton.jit(do_not_specialize=["tokens", "window"])
def attend(
    query, q_row, q_head, key, k_row, k_head, value, v_row, v_head, out, o_row, o_head, lse, sinks, items,
    tokens, heads, group, scale, cap, window,
    SIZE: tl.constexpr, SIZE_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, OWN: tl.constexpr,
    STEP: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, UNIT: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Fills out and lse [heads, tokens]."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    line = items + (tl.program_id(0) // heads) * LINE
    begin, length, first = tl.load(line).to(tl.int64), tl.load(line + 1), tl.load(line + 2)
    kv = head // group
    q_row, k_row, v_row, o_row = q_row * UNIT, k_row * UNIT, v_row * UNIT, o_row * UNIT
    key += kv * (k_head * UNIT)
    value += kv * (v_head * UNIT)
    at = begin + first
    q = _tile(query + at * q_row + head * (q_head * UNIT), q_row, length - first, SIZE, WIDTH, OWN, True).to(DOT)
    sums = tl.zeros([OWN, WIDTH_V], tl.float32)
    if SINKS:
        top = tl.zeros([OWN], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        total = tl.zeros([OWN], tl.float32) + 1.0
    else:
        top = tl.full([OWN], float("-inf"), tl.float32)
        total = tl.zeros([OWN], tl.float32)
    low, whole, diagonal, high = _key_spans(first, length, window, WINDOW, OWN, STEP)
    if WINDOW:
        sums, total, top = _attend_span(
            sums, total, top, q, key, k_row, value, v_row, begin, first, length, low, whole, scale, cap, window,
            SIZE, SIZE_V, WIDTH, WIDTH_V, OWN, STEP, CAPPED, WINDOW, DOT, True,
        )  # fmt: skip
    sums, total, top = _attend_span(
        sums, total, top, q, key, k_row, value, v_row, begin, first, length, whole, diagonal, scale, cap, window,
        SIZE, SIZE_V, WIDTH, WIDTH_V, OWN, STEP, CAPPED, WINDOW, DOT, False,
    )  # fmt: skip
    sums, total, top = _attend_span(
        sums, total, top, q, key, k_row, value, v_row, begin, first, length, diagonal, high, scale, cap, window,
        SIZE, SIZE_V, WIDTH, WIDTH_V, OWN, STEP, CAPPED, WINDOW, DOT, True,
    )  # fmt: skip
    row = tl.arange(0, OWN)
    tl.store(lse + head * tokens + at + row, (top + tl.log2(total)) / LOG2E, mask=row < length - first)
    out += at * o_row + head * (o_head * UNIT)
    _put(out, o_row, length - first, sums / total[:, None], SIZE_V, WIDTH_V, OWN)


@triton.jit
def _query_span(
    sums, q, do, lse2, delta, key, k_row, value, v_row, begin, first, length, low, high, scale, cap, window,
    SIZE: tl.constexpr, SIZE_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, OWN: tl.constexpr,
    STEP: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, over scale, from keys `low` to `high`."""
    for start in range(low, high, STEP):
        at = begin + start
        k = _tile(key + at * k_row, k_row, length - start, SIZE, WIDTH, STEP, MASKED)
        v = _tile(value + at * v_row, v_row, length - start, SIZE_V, WIDTH_V, STEP, MASKED)
        products = tl.dot(q, tl.trans(k).to(DOT), input_precision="ieee")
        scores, slope = _capped(products, scale, cap, CAPPED)
        shares = tl.exp2(scores - lse2[:, None])
        if MASKED:
            rows, columns = first + tl.arange(0, OWN)[:, None], start + tl.arange(0, STEP)[None, :]
            shares = tl.where(_seen(rows, columns, window, WINDOW), shares, 0.0)
        dscores = shares * (tl.dot(do, tl.trans(v).to(DOT), input_precision="ieee") - delta[:, None]) * slope
        sums = tl.dot(dscores.to(k.dtype).to(DOT), k.to(DOT), sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["tokens", "window"])
def attend_backward_queries(
    query, q_row, q_head, key, k_row, k_head, value, v_row, v_head, out, o_row, o_head, grad, g_row, g_head,
    dquery, dq_row, dq_head, lse, numbers, items, tokens, heads, group, scale, cap, window,
    SIZE: tl.constexpr, SIZE_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, OWN: tl.constexpr,
    STEP: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Fills dquery, and of numbers [heads, tokens, 4] the first two: lse in units of log 2, and delta, the sum of
    grad * out, which is the softmax's own term."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    line = items + (tl.program_id(0) // heads) * LINE
    begin, length, first = tl.load(line).to(tl.int64), tl.load(line + 1), tl.load(line + 2)
    kv, at, left = head // group, begin + first, length - first
    q_row, k_row, v_row, g_row, dq_row = q_row * UNIT, k_row * UNIT, v_row * UNIT, g_row * UNIT, dq_row * UNIT
    key += kv * (k_head * UNIT)
    value += kv * (v_head * UNIT)
    do = _tile(grad + at * g_row + head * (g_head * UNIT), g_row, left, SIZE_V, WIDTH_V, OWN, True)
    o_row = o_row * UNIT
    o = _tile(out + at * o_row + head * (o_head * UNIT), o_row, left, SIZE_V, WIDTH_V, OWN, True)
    own = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    row = tl.arange(0, OWN)
    there = row < left
    lse2 = tl.load(lse + head * tokens + at + row, mask=there, other=0.0) * LOG2E
    pair = numbers + (head * tokens + at + row)[:, None] * 4 + tl.arange(0, 2)[None, :]
    tl.store(pair, tl.join(lse2, own), mask=there[:, None])
    q = _tile(query + at * q_row + head * (q_head * UNIT), q_row, left, SIZE, WIDTH, OWN, True).to(DOT)
    do = do.to(DOT)
    sums = tl.zeros([OWN, WIDTH], tl.float32)
    low, whole, diagonal, high = _key_spans(first, length, window, WINDOW, OWN, STEP)
    if WINDOW:
        sums = _query_span(
            sums, q, do, lse2, own, key, k_row, value, v_row, begin, first, length, low, whole, scale, cap, window,
            SIZE, SIZE_V, WIDTH, WIDTH_V, OWN, STEP, CAPPED, WINDOW, DOT, True,
        )  # fmt: skip
    sums = _query_span(
        sums, q, do, lse2, own, key, k_row, value, v_row, begin, first, length, whole, diagonal, scale, cap, window,
        SIZE, SIZE_V, WIDTH, WIDTH_V, OWN, STEP, CAPPED, WINDOW, DOT, False,
    )  # fmt: skip
    sums = _query_span(
        sums, q, do, lse2, own, key, k_row, value, v_row, begin, first, length, diagonal, high, scale, cap, window,
        SIZE, SIZE_V, WIDTH, WIDTH_V, OWN, STEP, CAPPED, WINDOW, DOT, True,
    )  # fmt: skip
    _put(dquery + at * dq_row + head * (dq_head * UNIT), dq_row, left, sums * scale, SIZE, WIDTH, OWN)


@triton.jit
def _key_span(
    dk, dv, k, v, query, q_row, grad, g_row, numbers, begin, first, length, low, high, scale, cap, window,
    SIZE: tl.constexpr, SIZE_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, OWN: tl.constexpr,
    STEP: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradients of keys, over scale, and values from queries `low` to `high`; scores are turned: keys are rows.

    A query's numbers are four, so that a block of them is as wide as the program has threads: a narrower one is loaded
    by every thread for itself, sixteen times, where the scores' columns lie. Queries behind the last are zeros and add
    nothing."""
    for start in range(low, high, STEP):
        at = begin + start
        q = _tile(query + at * q_row, q_row, length - start, SIZE, WIDTH, STEP, MASKED)
        do = _tile(grad + at * g_row, g_row, length - start, SIZE_V, WIDTH_V, STEP, MASKED)
        rows = start + tl.arange(0, STEP)
        four = tl.arange(0, 4)[None, :]
        if MASKED:
            known = tl.load(numbers + rows[:, None] * 4 + four, mask=(rows < length)[:, None], other=0.0)
        else:
            known = tl.load(numbers + rows[:, None] * 4 + four)
        lse2, own = tl.sum(tl.where(four == 0, known, 0.0), 1), tl.sum(tl.where(four == 1, known, 0.0), 1)
        products = tl.dot(k, tl.trans(q).to(DOT), input_precision="ieee")
        scores, slope = _capped(products, scale, cap, CAPPED)
        shares = tl.exp2(scores - lse2[None, :])
        if MASKED:
            columns = first + tl.arange(0, OWN)
            shares = tl.where(_seen(rows[None, :], columns[:, None], window, WINDOW), shares, 0.0)
        dv = tl.dot(shares.to(do.dtype).to(DOT), do.to(DOT), dv, input_precision="ieee")
        dscores = shares * (tl.dot(v, tl.trans(do).to(DOT), input_precision="ieee") - own[None, :]) * slope
        dk = tl.dot(dscores.to(q.dtype).to(DOT), q.to(DOT), dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["tokens", "window"])
def attend_backward_keys(
    query, q_row, q_head, key, k_row, k_head, value, v_row, v_head, grad, g_row, g_head,
    dkey, dk_row, dk_head, dvalue, dv_row, dv_head, numbers, items, tokens, heads, group, scale, cap, window,
    SIZE: tl.constexpr, SIZE_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, OWN: tl.constexpr,
    STEP: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Fills dkey and dvalue; `heads` are those of keys."""
    kv = (tl.program_id(0) % heads).to(tl.int64)
    line = items + (tl.program_id(0) // heads) * LINE
    begin, length, first = tl.load(line).to(tl.int64), tl.load(line + 1), tl.load(line + 3)
    at, left = begin + first, length - first
    q_row, k_row, v_row, g_row = q_row * UNIT, k_row * UNIT, v_row * UNIT, g_row * UNIT
    k = _tile(key + at * k_row + kv * (k_head * UNIT), k_row, left, SIZE, WIDTH, OWN, True).to(DOT)
    v = _tile(value + at * v_row + kv * (v_head * UNIT), v_row, left, SIZE_V, WIDTH_V, OWN, True).to(DOT)
    dk = tl.zeros([OWN, WIDTH], tl.float32)
    dv = tl.zeros([OWN, WIDTH_V], tl.float32)
    behind = tl.minimum(first + OWN, length)
    whole, end = length // STEP * STEP, length  # up to where all of a block of queries sees all of these keys
    if WINDOW:
        whole = tl.minimum(whole, (first + window) // STEP * STEP)
        end = tl.minimum(end, first + OWN - 1 + window)
    whole = tl.maximum(whole, first + OWN)
    for member in range(group):
        head = kv * group + member
        q_at, g_at = query + head * (q_head * UNIT), grad + head * (g_head * UNIT)
        numbers_at = numbers + (head * tokens + begin) * 4
        dk, dv = _key_span(
            dk, dv, k, v, q_at, q_row, g_at, g_row, numbers_at, begin, first, length, first, behind,
            scale, cap, window, SIZE, SIZE_V, WIDTH, WIDTH_V, OWN, STEP, CAPPED, WINDOW, DOT, True,
        )  # fmt: skip
        dk, dv = _key_span(
            dk, dv, k, v, q_at, q_row, g_at, g_row, numbers_at, begin, first, length, first + OWN, whole,
            scale, cap, window, SIZE, SIZE_V, WIDTH, WIDTH_V, OWN, STEP, CAPPED, WINDOW, DOT, False,
        )  # fmt: skip
        dk, dv = _key_span(
            dk, dv, k, v, q_at, q_row, g_at, g_row, numbers_at, begin, first, length, whole, end,
            scale, cap, window, SIZE, SIZE_V, WIDTH, WIDTH_V, OWN, STEP, CAPPED, WINDOW, DOT, True,
        )  # fmt: skip
    dk_row, dv_row = dk_row * UNIT, dv_row * UNIT
    _put(dkey + at * dk_row + kv * (dk_head * UNIT), dk_row, left, dk * scale, SIZE, WIDTH, OWN)
    _put(dvalue + at * dv_row + kv * (dv_head * UNIT), dv_row, left, dv, SIZE_V, WIDTH_V, OWN)


@triton.jit
def attend_backward_sinks(sinks, numbers, dsinks, tokens, COLUMNS: tl.constexpr):
    """A head's sink takes its share of every row and gives nothing: minus the sum of share * delta."""
    head = tl.program_id(0).to(tl.int64)
    sink = tl.load(sinks + head).to(tl.float32) * LOG2E
    sums = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, tokens, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        at, inside = numbers + (head * tokens + column) * 4, column < tokens
        share = tl.exp2(sink - tl.load(at, mask=inside, other=0.0))
        sums -= share * tl.load(at + 1, mask=inside, other=0.0)
    tl.store(dsinks + head, tl.sum(sums, 0).to(dsinks.dtype.element_ty))
