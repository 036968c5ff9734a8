"""The element-wise parts of a layer on the GPU: RMS norm, rotary embedding, gated unit, forward and backward; dropout.

Formulas, symbols and the truth stand in the files of `ops/` with their names, which check what is given.
All of these wait for memory alone, so each value is read and written once: a program holds whole rows of a norm in
registers (several of them where they are short), all heads of a token that fit, or a stretch of a gated unit. A thread
has 16 values at the most, in pieces of 16 bytes. Arithmetic is fp32 and rounds where the truth does: no product is
fused with a sum. Offsets are 64 bits wide from the row on. Of what differs from pass to pass or from layer to layer
nothing is compiled in: else each kernel would be compiled again when the first multiple of 16 comes.
"""
# mypy: allow-untyped-defs
# Triton reads a kernel's annotations itself: only `tl.constexpr` may stand there.

import torch
import triton
import triton.language as tl
from torch import Tensor

from topwork.ops.triton.sizes import cdiv, power_of_2

TILE = 2048
"""Values to a program, where a row is not longer."""
GATED = 1024
"""Values of one row of a gated unit, or of dropout's input, to a program."""


def launch(values: int) -> dict[str, object]:
    """The launch options of a program of so many values: 16 to a thread."""
    return {"num_warps": max(1, min(16, values // 512)), "enable_fp_fusion": False}


@triton.jit
def _factor(weight, column, inside, UNIT_OFFSET: tl.constexpr):
    """What a norm multiplies by, fp32."""
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        factor += 1.0
    return factor


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x, x_outer, x_inner, inner, weight, rstd, y, rows, d, eps,
    KNOWN: tl.constexpr, UNIT_OFFSET: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y [rows, d] contiguous; row r of x begins at (r // inner) * x_outer + (r % inner) * x_inner."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    there, inside = row < rows, column < d
    keep = there[:, None] & inside
    at = (row // inner) * x_outer + (row % inner) * x_inner
    value = tl.load(x + at[:, None] + column, mask=keep, other=0.0).to(tl.float32)
    if KNOWN:
        scale = tl.load(rstd + row, mask=there, other=0.0)
    else:
        scale = 1.0 / tl.sqrt_rn(tl.sum(value * value, 1) / d + eps)
        tl.store(rstd + row, scale, mask=there)
    value = value * scale[:, None]
    if not UNIT_OFFSET:
        value = value.to(y.dtype.element_ty).to(tl.float32)
    value = value * _factor(weight, column, inside, UNIT_OFFSET)
    tl.store(y + row[:, None] * d + column, value.to(y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_backward(
    dy, dy_outer, dy_inner, x, x_outer, x_inner, inner, weight, rstd, dx, rows, d,
    UNIT_OFFSET: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    there, inside = row < rows, column < d
    keep = there[:, None] & inside
    outer, rest = row // inner, row % inner
    scale = tl.load(rstd + row, mask=there, other=0.0)[:, None]
    value = tl.load(x + (outer * x_outer + rest * x_inner)[:, None] + column, mask=keep, other=0.0).to(tl.float32)
    value = value * scale
    slope = tl.load(dy + (outer * dy_outer + rest * dy_inner)[:, None] + column, mask=keep, other=0.0).to(tl.float32)
    slope = slope * _factor(weight, column, inside, UNIT_OFFSET)
    mean = tl.sum(slope * value, 1)[:, None] / d
    out = scale * (slope - value * mean)
    tl.store(dx + row[:, None] * d + column, out.to(dx.dtype.element_ty), mask=keep)


@triton.jit
def _rotate(
    x, by_token, by_head, heads, blocks, cos, cos_row, sin, sin_row, half,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A program turns `HEADS` heads of one token."""
    token = (tl.program_id(0) // blocks).to(tl.int64)
    head = (tl.program_id(0) % blocks) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    inside = column < half
    c1 = tl.load(cos + token * cos_row + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + token * cos_row + half + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + token * sin_row + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + token * sin_row + half + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = x + (token * by_token + head.to(tl.int64) * by_head)[:, None] + column[None, :]
    keep = (head < heads)[:, None] & inside[None, :]
    x1 = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    x2 = tl.load(at + half, mask=keep, other=0.0).to(tl.float32)
    if INVERSE:
        first, second = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        first, second = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    tl.store(at, first.to(x.dtype.element_ty), mask=keep)
    tl.store(at + half, second.to(x.dtype.element_ty), mask=keep)


@triton.jit
def _share(x, KIND: tl.constexpr):
    """act(x) / x."""
    if KIND == "silu":
        share = tl.sigmoid(x)
    elif KIND == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2 sqrt(2 / pi)
    else:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return share


@triton.jit
def _gated(gate, gate_row, up, up_row, h, f, chunks, KIND: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) // chunks).to(tl.int64)
    column = (tl.program_id(0) % chunks) * COLUMNS + tl.arange(0, COLUMNS)
    keep = column < f
    x = tl.load(gate + row * gate_row + column, mask=keep, other=0.0).to(tl.float32)
    other = tl.load(up + row * up_row + column, mask=keep, other=0.0).to(tl.float32)
    active = (x * _share(x, KIND)).to(h.dtype.element_ty).to(tl.float32)
    tl.store(h + row * f + column, (active * other).to(h.dtype.element_ty), mask=keep)


@triton.jit
def _gated_backward(
    dh, dh_row, gate, gate_row, up, up_row, dgate, dgate_row, dup, dup_row, f, chunks,
    KIND: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All is read before anything is written: dgate and dup may be gate and up."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    column = (tl.program_id(0) % chunks) * COLUMNS + tl.arange(0, COLUMNS)
    keep = column < f
    x = tl.load(gate + row * gate_row + column, mask=keep, other=0.0).to(tl.float32)
    other = tl.load(up + row * up_row + column, mask=keep, other=0.0).to(tl.float32)
    slope = tl.load(dh + row * dh_row + column, mask=keep, other=0.0).to(tl.float32)
    share = _share(x, KIND)
    if KIND == "silu":
        bend = share * (1.0 + x * (1.0 - share))
    elif KIND == "gelu_tanh":
        bend = share + x * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        bend = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    tl.store(dgate + row * dgate_row + column, (slope * other * bend).to(dgate.dtype.element_ty), mask=keep)
    tl.store(dup + row * dup_row + column, (slope * x * share).to(dup.dtype.element_ty), mask=keep)


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["key"])
def _drop(x, x_row, y, y_row, draws, key, least, scale, d, chunks, ADD: tl.constexpr, COLUMNS: tl.constexpr):
    """Draws, key and least are uint32 in 64 bits."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    column = (tl.program_id(0) % chunks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < d
    own = _mixed((tl.load(draws + row) ^ key).to(tl.uint32))
    hashed = _mixed(((column + 1).to(tl.uint32) * 0x9E3779B9) ^ own)
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32) * scale
    value = tl.where(hashed.to(tl.int64) >= least, value, 0.0)
    if ADD:
        value += tl.load(y + row * y_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * y_row + column, value.to(y.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """y like x, contiguous, and rstd [rows] fp32."""
    rstd = torch.empty(x.numel() // x.shape[-1], device=x.device)
    return _norm(x, weight, rstd, eps, False, unit_offset), rstd


def rms_normalized(x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool) -> Tensor:
    """y again, bit for bit."""
    return _norm(x, weight, rstd.contiguous(), 0.0, True, unit_offset)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, unit_offset: bool) -> Tensor:
    """dx like x, contiguous."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d = x.shape[-1]
    held, width = _tile(d)
    x, *x_at, inner = _rows(x)
    dy, *dy_at, _ = _rows(dy)
    rows = dx.numel() // d
    if rows:
        with torch.cuda.device_of(x):
            _rms_norm_backward[(cdiv(rows, held),)](
                dy, *dy_at, x, *x_at, inner, weight.contiguous(), rstd.contiguous(), dx, rows, d,
                UNIT_OFFSET=unit_offset, ROWS=held, WIDTH=width, **launch(held * width),
            )  # fmt: skip
    return dx


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """x [T, H, D] in place."""
    (tokens, heads, _), half = x.shape, cos.shape[1] // 2
    if tokens * heads * half == 0:
        return
    cos, sin = (table if table.stride(1) == 1 else table.contiguous() for table in (cos, sin))
    width = power_of_2(half)
    held = min(power_of_2(heads), max(1, TILE // width))
    blocks = cdiv(heads, held)
    with torch.cuda.device_of(x):
        _rotate[(tokens * blocks,)](
            x, x.stride(0), x.stride(1), heads, blocks, cos, cos.stride(0), sin, sin.stride(0), half,
            INVERSE=inverse, HEADS=held, HALF=width, **launch(held * width),
        )  # fmt: skip


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """h [T, f], contiguous."""
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = _by_row(gate), _by_row(up)
    chunks = cdiv(h.shape[1], GATED)
    if h.numel():
        with torch.cuda.device_of(h):
            _gated[(h.shape[0] * chunks,)](
                gate, gate.stride(0), up, up.stride(0), h, h.shape[1], chunks, KIND=kind, COLUMNS=GATED,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return h


def gated_backward(dh: Tensor, gate: Tensor, up: Tensor, kind: str, dgate: Tensor, dup: Tensor) -> None:
    """Fills dgate and dup [T, f], of any row stride."""
    dh, gate, up = _by_row(dh), _by_row(gate), _by_row(up)
    chunks = cdiv(dh.shape[1], GATED)
    if dh.numel():
        with torch.cuda.device_of(dh):
            _gated_backward[(dh.shape[0] * chunks,)](
                dh, dh.stride(0), gate, gate.stride(0), up, up.stride(0), dgate, dgate.stride(0), dup, dup.stride(0),
                dh.shape[1], chunks, KIND=kind, COLUMNS=GATED, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip


def drop(x: Tensor, draws: Tensor, key: int, least: int, scale: float, out: Tensor, add: bool) -> None:
    """Fills `out` [rows, d], of any row stride, or adds to it."""
    x, chunks = _by_row(x), cdiv(x.shape[1], GATED)
    if x.numel():
        with torch.cuda.device_of(x):
            _drop[(x.shape[0] * chunks,)](
                x, x.stride(0), out, out.stride(0), draws.contiguous(), key, least, scale, x.shape[1], chunks,
                ADD=add, COLUMNS=GATED, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip


def _norm(x: Tensor, weight: Tensor, rstd: Tensor, eps: float, known: bool, unit_offset: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d, rows = x.shape[-1], rstd.shape[0]
    held, width = _tile(d)
    x, outer, between, inner = _rows(x)
    if rows:
        with torch.cuda.device_of(x):
            _rms_norm[(cdiv(rows, held),)](
                x, outer, between, inner, weight.contiguous(), rstd, y, rows, d, eps,
                KNOWN=known, UNIT_OFFSET=unit_offset, ROWS=held, WIDTH=width, **launch(held * width),
            )  # fmt: skip
    return y


def _tile(d: int) -> tuple[int, int]:
    """Rows to a program, and what a row takes."""
    width = power_of_2(d)
    return max(1, TILE // width), width


def _rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x with contiguous rows, its strides from one outer and one inner row to the next, and the inner rows' number."""
    x = _by_row(x)
    if x.ndim == 3:
        return x, x.stride(0), x.stride(1), x.shape[1]
    x = x.reshape(-1, x.shape[-1])
    return x, x.stride(0), 0, 1


def _by_row(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
