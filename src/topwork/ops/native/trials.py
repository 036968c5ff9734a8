"""What a compiled kernel is tried with: small inputs, odd shapes among them, beside plain torch.

Every function of a library is called with both types and with what its vectors, tiles and panels do not divide. Results
begin as NaN, so that what is not written is seen.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from topwork.ops.attention import attention_backward, attention_forward
from topwork.ops.attention_reference import AttentionRule, backward_reference, forward_reference
from topwork.ops.dropout import Dropout, drop, drop_reference
from topwork.ops.gain import gain_gradients_, gain_sums_reference_, multiply_, multiply_reference_
from topwork.ops.gated import KINDS, gated, gated_backward, gated_backward_reference, gated_reference
from topwork.ops.grouped import Addend, Product, grouped_products, grouped_products_reference
from topwork.ops.logprobs import logprob_slope_, logprob_slope_reference
from topwork.ops.native.trials_decode import decode
from topwork.ops.native.trials_decoder import decoder
from topwork.ops.norm import (
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_reference,
    rms_normalized,
)
from topwork.ops.packed import pack_4bit, pack_int8
from topwork.ops.prologues import RmsNorm
from topwork.ops.quantize import (
    code_of,
    dequantize_4bit_reference,
    dequantize_int8_reference,
    quantize_4bit_reference,
)
from topwork.ops.residual import add_and_norm, add_and_norm_backward, add_and_round, add_and_round_reference
from topwork.ops.rotary import rotate_, rotate_reference_

TYPES = (torch.float32, torch.bfloat16)
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far a result may be off that is rounded once: `Case.far`."""
ATTENDED = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""In bf16 probabilities and their gradients are rounded on the way."""
SHAPES = ((1, 1, 1), (5, 17, 33), (16, 16, 32), (33, 64, 16), (65, 130, 48), (130, 16, 97), (20, 31, 530), (70, 3, 64),
          (70, 40, 2100))  # fmt: skip
"""m, n and k of products: below, at and beyond what tiles and panels hold."""


class Case(NamedTuple):
    """A result and the true one; `limit` is how far off it may be."""

    what: str
    found: Tensor
    expected: Tensor
    limit: float

    def far(self) -> float:
        """The largest error, each by its value's size and the root mean square of all; NaN stays NaN."""
        if self.found.shape != self.expected.shape:
            return float("inf")
        found, expected = self.found.double(), self.expected.double()
        size = expected.abs() + expected.square().mean().sqrt()
        return float(((found - expected).abs() / size.clamp_min(1e-30)).max()) if found.numel() else 0.0


def attention() -> list[Case]:
    """Several sequences, forward and backward: with and without a window, query heads that share keys or do not."""
    cases = []
    bounds = (0, 1, 1, 6, 39, 136, 202)
    for dtype, (heads, key_heads, size), window in product(TYPES, ((3, 1, 64), (2, 2, 16), (4, 2, 80)), (None, 23)):
        rule = AttentionRule(size**-0.5, window)
        grad, query, key, value = (_random(bounds[-1], n, size).to(dtype) for n in (heads, heads, key_heads, key_heads))
        out, lse = attention_forward(query, key, value, bounds, rule)
        found = (out, *attention_backward(grad, query, key, value, out, lse, bounds, rule)[:3])
        g, q, k, v = (x.double() for x in (grad, query, key, value))
        truth, into = forward_reference(q, k, v, bounds, rule), [torch.empty_like(x) for x in (q, k, v)]
        backward_reference(g, q, k, v, truth, bounds, rule, None, into)
        names = ("attention", "its query's gradient", "its key's gradient", "its value's gradient")
        cases += [
            Case(f"{name} in {_told(dtype)}", x, y, ATTENDED[dtype])
            for name, x, y in zip(names, found, (truth, *into), strict=True)
        ]
    return cases


def grouped() -> list[Case]:
    """All shapes in one call: operands turned or not, outputs of both types, overwritten and added to."""
    given, names = [], []
    ways = list(product((False, True), (False, True), TYPES, (0, 1)))
    for dtype in TYPES:
        for number, (shape, way) in enumerate(product(SHAPES, ways)):
            given.append(_product(shape, dtype, *way))
            names.append(f"product {number} of {' × '.join(map(str, shape))} in {_told(dtype)}")
    for shape in SHAPES:
        given.append(_beside_fp32(*shape))
        names.append(f"a product of {' × '.join(map(str, shape))} of bf16 beside fp32")
        given.append(_with_addend(*shape))
        names.append(f"a product of {' × '.join(map(str, shape))} with an addend")
    truth = [product._replace(out=product.out.to(torch.float32, copy=True)) for product in given]
    grouped_products_reference(truth)
    grouped_products(given)
    return [Case(name, mine.out, its.out, ROUNDED[mine.out.dtype]) for name, mine, its in zip(names, given, truth)]


def _product(
    shape: tuple[int, int, int], dtype: torch.dtype, left_turned: bool, right_turned: bool, out: torch.dtype, beta: int
) -> Product:
    """The output stands in wider rows."""
    m, n, k = shape
    left = _random(k, m).to(dtype).t() if left_turned else _random(m, k).to(dtype)
    right = _random(n, k).to(dtype).t() if right_turned else _random(k, n).to(dtype)
    into = torch.full((m, n + 5), torch.nan).to(out)[:, 3:-2]
    return Product(left, right, into.copy_(_random(m, n)) if beta else into, 0.37, beta)


def _beside_fp32(m: int, n: int, k: int) -> Product:
    return Product(_random(m, k).bfloat16(), _random(n, k).t(), torch.empty(m, n), 2.0)


def _with_addend(m: int, n: int, k: int) -> Product:
    """In its lower right part."""
    row, column = m // 2, n // 32 * 16
    addend = Addend(_random(m - row, 8).bfloat16(), _random(n - column, 8).t(), row, column, 0.5)
    return Product(_random(m, k).bfloat16(), _random(k, n).bfloat16(), torch.empty(m, n), addends=(addend,))


def layer() -> list[Case]:
    """Norms, rotary positions, sums, gains, dropout and gated units."""
    cases = []
    for dtype, width in product(TYPES, (5, 64, 83)):
        cases += [*_norms(dtype, width), *_gains(dtype, width), *_gated(dtype, width)]
    for dtype in TYPES:
        cases += [*_rotary(dtype), *_dropped(dtype)]
    return [*cases, *_residual(), *_residual_norms()]


def _norms(dtype: torch.dtype, width: int) -> list[Case]:
    cases = []
    for offset in (False, True):
        x, dy, weight = _random(7, width).to(dtype), _random(7, width).to(dtype), _random(width).to(dtype)
        y, rstd = rms_norm(x, weight, 1e-5, offset)
        truth, its = rms_norm_reference(x, weight, 1e-5, offset)
        found = (y, rstd, rms_normalized(x, weight, rstd, offset), rms_norm_backward(dy, x, weight, rstd, offset))
        expected = (truth, its, truth, rms_norm_backward_reference(dy, x, weight, its, offset))
        cases += _cases(f"norms of {width} values", dtype, found, expected)
    return cases


def _gains(dtype: torch.dtype, width: int) -> list[Case]:
    z, dy = _random(130, width).to(dtype), _random(130, width).to(dtype)
    factor, left_alone = 1 + 0.1 * _random(width), _random(width)
    found, expected = z.clone(), z.clone()
    multiply_(found, factor, left_alone)
    multiply_reference_(expected, factor, left_alone)
    first = _cases("gains", dtype, [found.clone()], [expected.clone()])
    same = expected.clone()
    slope = gain_gradients_(same, dy, factor, left_alone)
    total = gain_sums_reference_(expected, dy, factor, left_alone, expected)
    return [*first, *_cases("gains' gradients", dtype, [same, slope], [expected, total / factor])]


def _gated(dtype: torch.dtype, width: int) -> list[Case]:
    cases = []
    for kind in KINDS:
        dh, gate, up = (_random(5, width).to(dtype) for _ in range(3))
        again = torch.full_like(gate, torch.nan)
        found = (gated(gate, up, kind), *gated_backward(dh, gate, up, kind, h=again), again)
        h = gated_reference(gate, up, kind)
        expected = (h, *gated_backward_reference(dh, gate, up, kind), h)
        cases += _cases(f"gated units ({kind})", dtype, found, expected)
    return cases


def _rotary(dtype: torch.dtype) -> list[Case]:
    cases = []
    for inverse, rotated in product((False, True), (22, 80)):
        x = _random(5, 3, 80).to(dtype)
        angles = _random(5, rotated)
        found, expected = x.clone(), x.clone()
        rotate_(found, angles.cos(), angles.sin(), inverse)
        rotate_reference_(expected, angles.cos(), angles.sin(), inverse)
        cases += _cases("rotary positions", dtype, [found], [expected])
    return cases


def _dropped(dtype: torch.dtype) -> list[Case]:
    cases = []
    for add in (False, True):
        dropout = Dropout(0.3, 12345, torch.arange(9) * 977)
        x, found = _random(9, 83).to(dtype), _random(9, 83).to(dtype)
        expected = found.clone()
        drop(x, dropout, found, add)
        drop_reference(x, dropout, expected, add)
        cases += _cases("dropout", dtype, [found], [expected])
    return cases


def _residual() -> list[Case]:
    x, y = _random(1, 5, 83), _random(5, 83).bfloat16()
    found, expected = [(torch.empty_like(x), torch.empty_like(y)) for _ in range(2)]
    add_and_round(x, y, 0.7, *found, 1.3)
    add_and_round_reference(x, y, 0.7, *expected, 1.3)
    return _cases("residual sums", torch.bfloat16, found, expected)


def _residual_norms() -> list[Case]:
    """The sum and the norm of its branch in one pass each way, beside the two of them."""
    cases = []
    for width, offset in product((5, 64, 83), (False, True)):
        x, dx, y, dn = (
            _random(1, 7, width),
            _random(1, 7, width),
            _random(7, width).bfloat16(),
            _random(7, width).bfloat16(),
        )
        norm = RmsNorm(_random(width).bfloat16(), 1e-5, offset)
        (total, branch), (its_total, its_branch) = [(torch.empty_like(x), torch.empty_like(y)) for _ in range(2)]
        n, rstd = add_and_norm(x, y, 0.7, total, branch, norm)
        add_and_round_reference(x, y, 0.7, its_total, its_branch)
        its_n, its_rstd = rms_norm_reference(its_branch, norm.weight, norm.eps, offset)
        found, expected = (total, branch, n, rstd), (its_total, its_branch, its_n, its_rstd)
        cases += _cases(f"residual sums and norms of {width} values", torch.bfloat16, found, expected)
        (back, dy), (its_back, its_dy) = [(torch.empty_like(x), torch.empty_like(y)) for _ in range(2)]
        add_and_norm_backward(dx, dn, (branch, rstd), norm, back, dy, 0.7)
        slope = rms_norm_backward_reference(dn, its_branch, norm.weight, its_rstd, offset)
        add_and_round_reference(dx, slope, 1.0, its_back, its_dy, 0.7)
        cases += _cases("their gradients", torch.bfloat16, (back, dy), (its_back, its_dy))
    return cases


def logprobs() -> list[Case]:
    """Vocabularies that vectors divide, and that they do not."""
    cases = []
    for dtype, vocabulary, scale in product(TYPES, (1, 33, 512, 2049), (1.0, 0.4)):
        logits, gradient = (3 * _random(6, vocabulary)).to(dtype), _random(6)
        targets = torch.arange(6) * 31 % vocabulary
        expected = logprob_slope_reference(logits, targets, gradient, scale)
        found = (logprob_slope_(logits, targets, gradient, scale), logits)
        cases += [
            Case(f"log-probabilities among {vocabulary} in {_told(dtype)}", mine, its, ROUNDED[mine.dtype])
            for mine, its in zip(found, expected)
        ]
    return cases


def quantize4() -> list[Case]:
    """Packing and unpacking, which equal plain torch to the bit."""
    cases = []
    for dtype, (quant_type, block) in product(TYPES, (("nf4", 64), ("fp4", 32))):
        weight = _random(33, 65)
        flat, code = weight.flatten(), code_of(quant_type)
        order = torch.argsort(code, stable=True)
        bounds = (code[order[:-1]] + code[order[1:]]) / 2
        truth = quantize_4bit_reference(flat, bounds, order.to(torch.uint8), block)
        packed = pack_4bit(weight, quant_type, block, False)
        cases += [Case(f"codes of {quant_type}", x, y, 0) for x, y in zip((packed.codes, packed.absmax), truth)]
        for doubly in (False, True):
            held = pack_4bit(weight.to(dtype), quant_type, block, doubly)
            expected = dequantize_4bit_reference(
                held.codes, held.absmax, held.nested_absmax, held.nested_code, held.offset, quant_type, block, 65,
                3, 30, 5, 62, dtype,
            )  # fmt: skip
            cases.append(
                Case(f"values of {quant_type} in {_told(dtype)}", held.panel(slice(3, 30), slice(5, 62)), expected, 0)
            )
    for dtype in TYPES:
        eight = pack_int8(_random(9, 65).to(dtype))
        expected = dequantize_int8_reference(eight.codes, eight.absmax, 2, 8, 3, 64, dtype)
        cases.append(Case(f"values of int8 in {_told(dtype)}", eight.panel(slice(2, 8), slice(3, 64)), expected, 0))
    return cases


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cases(what: str, dtype: torch.dtype, found: "list[Tensor] | tuple[Tensor, ...]", expected: object) -> list[Case]:
    pairs = zip(found, expected, strict=True)  # type: ignore[call-overload]
    return [Case(f"{what} in {_told(dtype)}", mine, its, ROUNDED[mine.dtype]) for mine, its in pairs]


def _decoded() -> list[Case]:
    return [Case(*found) for found in decode()]


def _decoder() -> list[Case]:
    return [Case(*found) for found in decoder()]


TRIALS: dict[str, Callable[[], list[Case]]] = {
    "attention": attention, "decode": _decoded, "decoder": _decoder, "grouped": grouped, "layer": layer,
    "logprobs": logprobs, "quantize4": quantize4,
}  # fmt: skip
"""Of each C file; tests/ops/test_native_proof.py sees that every function is called."""
