"""A layer's and the loss's operations at an 8B model's sizes: inputs, the operation as the step calls it, its truth,
and what it moves and computes at least."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpu.operation import Maker, Operation, Sizes, Tensors
from reference.measure import apart
from topwork.common.seeds import hashed
from topwork.ops import gain, gated, norm, residual, rotary
from topwork.ops.attention_reference import AttentionRule, backward_reference, forward_reference
from topwork.ops.dropout import Dropout, drop, drop_reference
from topwork.ops.logprobs import chunk_rows, logprob_slope_, logprob_slope_reference
from topwork.ops.packed import Packed4bit, PackedInt8, pack_4bit, pack_int8
from topwork.ops.quantize import dequantize_4bit_reference, dequantize_int8_reference
from topwork.ops.row_lengths import row_lengths, row_lengths_reference
from topwork.ops.varlen import KERNELS, Inputs, Kernel


def operations(size: Sizes, dtype: torch.dtype, device: torch.device) -> list[Operation]:
    """All of them; the residual sum is one of two types, so not in fp32."""
    make = Maker(device, dtype)
    found = [*norms(size, make), *rotations(size, make), *gates(size, make), *drops(size, make), *gains(size, make)]
    found += losses(size, make) + packed(size, make) + lengths(size, make)
    found += attentions(size, make)
    return found if dtype == torch.float32 else found + sums(size, make)


def norms(size: Sizes, make: Maker) -> list[Operation]:
    t, d = size.tokens, size.hidden

    def inputs() -> Tensors:
        x, weight = make(t, d), make(d)
        return make(t, d), x, weight, norm.rms_norm_reference(x, weight, 1e-5, False)[1]

    return [
        Operation(
            "rms norm", inputs, lambda _, x, w, *__: norm.rms_norm(x, w, 1e-5),
            lambda _, x, w, *__: norm.rms_norm_reference(x, w, 1e-5, False), 2 * t * d * make.bytes, make.tolerance,
        ),
        Operation(
            "rms norm, backward", inputs, lambda dy, x, w, rstd: [norm.rms_norm_backward(dy, x, w, rstd)],
            lambda dy, x, w, rstd: [norm.rms_norm_backward_reference(dy, x, w, rstd, False)],
            3 * t * d * make.bytes, make.tolerance,
        ),
    ]  # fmt: skip


def rotations(size: Sizes, make: Maker) -> list[Operation]:
    t, heads = size.tokens, size.heads + size.key_heads

    def inputs() -> Tensors:
        buffer = make(t, heads + size.key_heads, size.head)
        cos, sin = (torch.rand(t, size.head, device=make.device).to(make.dtype) for _ in range(2))
        return buffer, cos, sin

    def by(rotate: Callable[[Tensor, Tensor, Tensor], None]) -> Callable[..., list[Tensor]]:
        def call(buffer: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
            rotate(buffer[:, :heads], cos, sin)
            return [buffer]

        return call

    moved = 2 * t * (heads + 1) * size.head * make.bytes
    return [
        Operation("rotary", inputs, by(rotary.rotate_), by(rotary.rotate_reference_), moved, make.tolerance),
    ]


def gates(size: Sizes, make: Maker) -> list[Operation]:
    t, f = size.tokens, size.inner

    def halves(buffer: Tensor) -> tuple[Tensor, Tensor]:
        return buffer[:, :f], buffer[:, f:]

    def back(dh: Tensor, buffer: Tensor) -> list[Tensor]:
        gate, up = halves(buffer)
        return list(gated.gated_backward(dh, gate, up, "silu", (gate, up)))

    return [
        Operation(
            "gated product", lambda: (make(t, 2 * f),), lambda x: [gated.gated(*halves(x), "silu")],
            lambda x: [gated.gated_reference(*halves(x), "silu")], 3 * t * f * make.bytes, make.tolerance,
        ),
        Operation(
            "gated product, backward", lambda: (make(t, f), make(t, 2 * f)), back,
            lambda dh, x: gated.gated_backward_reference(dh, *halves(x), "silu"),
            5 * t * f * make.bytes, make.tolerance,
        ),
    ]  # fmt: skip


def drops(size: Sizes, make: Maker) -> list[Operation]:
    t, d = size.tokens, size.hidden

    def inputs() -> Tensors:
        return make(t, d), make(t, d), torch.randint(0, 2**32, (t,), device=make.device)

    def by(add: bool, dropped: Callable[..., object]) -> Callable[..., list[Tensor]]:
        def call(x: Tensor, out: Tensor, seeds: Tensor) -> list[Tensor]:
            dropped(x, Dropout(0.1, hashed("a layer"), seeds), out, add)
            return [out]

        return call

    return [
        Operation(
            f"dropout{', added' if add else ''}", inputs, by(add, drop), by(add, drop_reference),
            (3 if add else 2) * t * d * make.bytes, make.tolerance,
        )
        for add in (False, True)
    ]  # fmt: skip


def gains(size: Sizes, make: Maker) -> list[Operation]:
    t, d = size.tokens, size.hidden

    def inputs() -> Tensors:
        return make(t, d), make(t, d), 1 + torch.rand(d, device=make.device)

    def written(call: Callable[..., object]) -> Callable[..., list[Tensor]]:
        def run(z: Tensor, _: Tensor, factor: Tensor) -> list[Tensor]:
            call(z, factor)
            return [z]

        return run

    def output_truth(y: Tensor, dy: Tensor, factor: Tensor) -> list[Tensor]:
        return [gain.gain_sums_reference_(y, dy, factor, None, y) / factor, y]

    one = 2 * t * d * make.bytes
    summed = max(make.tolerance, apart(1, t))
    return [
        Operation(
            "gain", inputs, written(gain.multiply_), written(lambda z, f: gain.multiply_reference_(z, f, None)), one,
            make.tolerance,
        ),
        Operation(
            "gain, backward", inputs, lambda y, dy, f: [gain.gain_gradients_(y, dy, f), y], output_truth, 1.5 * one,
            summed,
        ),
        Operation(
            "gain of inputs, backward", inputs, lambda z, dy, f: [gain.input_gain_gradients_(z, dy, f), dy],
            lambda z, dy, f: [gain.gain_sums_reference_(z, dy, f, None, dy), dy], 1.5 * one, summed,
        ),
        Operation("shift", inputs, written(gain.add_), written(gain.add_reference_), one, make.tolerance),
        Operation(
            "shift, backward", inputs, lambda _, dy, __: [gain.column_sums(dy)],
            lambda _, dy, __: [gain.column_sums_reference(dy)], one / 2, summed,
        ),
    ]  # fmt: skip


def lengths(size: Sizes, make: Maker) -> list[Operation]:
    out, r = size.inner, 16

    def inputs() -> Tensors:
        a, b = make.wide(r, size.hidden) / size.hidden**0.5, make.wide(out, r) / r**0.5
        return 1 + make.wide(out).square(), b, make(out, r), a @ a.t()

    return [
        Operation(
            "row lengths", inputs, lambda *x: [row_lengths(*x, 0.5)], lambda *x: [row_lengths_reference(*x, 0.5)],
            out * (r * (4 + make.bytes) + 8), 1e-6,
        )
    ]  # fmt: skip


def sums(size: Sizes, make: Maker) -> list[Operation]:
    t, d = size.tokens, size.hidden

    def by(add: Callable[..., None]) -> Callable[..., list[Tensor]]:
        def call(x: Tensor, y: Tensor, rounded: Tensor) -> list[Tensor]:
            add(x, y, 1.0, x, rounded)
            return [x, rounded]

        return call

    return [
        Operation(
            "residual sum", lambda: (make.wide(1, t, d), make(t, d), make(t, d)), by(residual.add_and_round),
            by(residual.add_and_round_reference), t * d * (8 + 2 * make.bytes), make.tolerance,
        )
    ]  # fmt: skip


def losses(size: Sizes, make: Maker) -> list[Operation]:
    rows = min(size.tokens, chunk_rows(size.vocabulary, make.device, make.bytes))

    def inputs() -> Tensors:
        targets = torch.randint(0, size.vocabulary, (rows,), device=make.device)
        return make(rows, size.vocabulary), targets, torch.ones(rows, device=make.device)

    def slope(logits: Tensor, targets: Tensor, gradient: Tensor) -> list[Tensor]:
        return [logprob_slope_(logits, targets, gradient), logits]

    tolerance = max(make.tolerance, apart(1, size.vocabulary))
    return [
        Operation("loss and its slope", inputs, slope, logprob_slope_reference, 2 * rows * size.vocabulary * make.bytes,
                  tolerance)
    ]  # fmt: skip


def packed(size: Sizes, make: Maker) -> list[Operation]:
    rows, columns = size.inner, size.hidden
    whole = (0, rows, 0, columns)

    def nf4() -> Tensors:
        held = pack_4bit(make(rows, columns), "nf4", 64, True)
        assert held.nested_absmax is not None
        assert held.nested_code is not None
        return held.codes, held.absmax, held.nested_absmax, held.nested_code, torch.tensor(held.offset)

    def unpack(*held: Tensor) -> list[Tensor]:
        codes, absmax, nested, code, offset = held
        weight = Packed4bit(codes, absmax, (rows, columns), make.dtype, "nf4", 64, nested, code, float(offset))
        return [weight.panel(slice(0, rows), slice(0, columns))]

    def unpack_truth(*held: Tensor) -> list[Tensor]:
        codes, absmax, nested, code, offset = held
        return [
            dequantize_4bit_reference(
                codes, absmax, nested, code, float(offset), "nf4", 64, columns, *whole, make.dtype
            )
        ]

    def int8() -> Tensors:
        held = pack_int8(make(rows, columns))
        return held.codes, held.absmax

    def unpack8(codes: Tensor, absmax: Tensor) -> list[Tensor]:
        return [PackedInt8(codes, absmax, (rows, columns), make.dtype).panel(slice(0, rows), slice(0, columns))]

    values = rows * columns
    return [
        Operation("unpacking NF4", nf4, unpack, unpack_truth, values * (0.5 + 1 / 64 + make.bytes), 0.0),
        Operation(
            "unpacking int8", int8, unpack8,
            lambda codes, absmax: [dequantize_int8_reference(codes, absmax, *whole, make.dtype)],
            values * (1 + make.bytes), 0.0,
        ),
    ]  # fmt: skip


def attentions(size: Sizes, make: Maker) -> list[Operation]:
    """By every kernel that can, not only the one that is chosen (the first)."""
    t, step = size.tokens, min(size.sequence, size.tokens)
    bounds, rule = (*range(0, t, step), t), AttentionRule(size.head**-0.5)

    def inputs() -> Tensors:
        buffer = make(t, size.heads + 2 * size.key_heads, size.head)
        return (*buffer.split((size.heads, size.key_heads, size.key_heads), 1), make(t, size.heads, size.head))

    def forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> list[Tensor]:
        return [kernel.forward(Inputs(q, k, v, bounds, rule, None))[0]]

    def back(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        given, into = (
            Inputs(q, k, v, bounds, rule, None),
            (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
        )
        kernel.backward(given, grad, *kernel.forward(given), into)
        return list(into)

    def back_truth(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        found = [torch.empty_like(x) for x in (q, k, v)]
        out = forward_reference(q, k, v, bounds, rule, None)
        backward_reference(grad, q, k, v, out, bounds, rule, None, tuple(found))
        return found

    width, products = size.heads * size.head, 2 * t * step * size.heads * size.head
    moved = t * (2 * width + 2 * size.key_heads * size.head) * make.bytes
    # plain torch rounds scores and slopes to 16 bits too, and in fp32 may go through a kernel that rounds products
    tolerance = max(3 * make.tolerance, 1e-3)
    tried = Inputs(*inputs()[:3], bounds, rule, None)
    return [
        operation
        for kernel in KERNELS if kernel.lacks(tried) is None
        for operation in (
            Operation(
                f"attention by {kernel.name}", inputs, partial(forward, kernel),
                lambda q, k, v, _: [forward_reference(q, k, v, bounds, rule, None)], moved, tolerance, products,
            ),
            Operation(
                f"attention by {kernel.name}, forward and backward", inputs, partial(back, kernel), back_truth,
                3 * moved, tolerance, 3 * products,
            ),
        )
    ]  # fmt: skip
