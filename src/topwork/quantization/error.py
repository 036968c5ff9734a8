"""What a data type makes of weights: its error against the 16-bit weight, and the bits it takes.

    nf4, fp4       ops/packed.py
    int4, int8     uniform: constant = max |w| of the block, code = round(w / constant * levels), value =
                   code * constant / levels, with levels 7 (-7 .. 7) and 127; to compare with, never written
    e2m1           the textbook's 4-bit float: 0, 1, 2, 3, 4, 6, 8, 12 twelfths of the constant and their negatives.
                   bitsandbytes' fp4 has 1/16 in the place of 1, so that three of its codes nearly are zero
    int8 by row    bitsandbytes' int8, what `load_in_8bit` holds

Every block-wise type can hold its constants in 8 bits (double quantization), by the same functions. Errors are those of
the fp32 values that the codes stand for; a layer rounds these to its own 16-bit type once more.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from topwork.ops.packed import NESTED_BLOCK, dequantize_constants, pack_4bit, pack_int8, quantize_constants
from topwork.ops.quantize import BLOCK_SIZES

BITS = {"nf4": 4, "fp4": 4, "int4": 4, "int8": 8, "e2m1": 4}
"""Bits of a code, by data type."""
SWEPT = ("nf4", "fp4", "int4", "int8")
LEVELS = {"int4": 7, "int8": 127, "e2m1": 12}
"""The largest code of a type whose codes are whole numbers; the smallest is its negative."""
AT_ONCE = 1 << 18
"""Values compared at a time, so that they stay in cache; a layer's fp64 form never exists whole."""
_MAP_BYTES = 4 * 256
_SMALLEST = 1e-38

Rows = Callable[[int, int], Tensor]
"""Rows [start, stop) of a dequantized weight, fp32."""


@dataclass(frozen=True)
class Packing:
    """A data type, the values that share a constant (None: a row of them), and how the constants are held."""

    quant_type: str
    block_size: int | None
    double_quant: bool = False

    @property
    def name(self) -> str:
        """As `nf4 + DQ`, `int8 by row`; without the block size."""
        return self.quant_type + (" by row" if self.block_size is None else " + DQ" if self.double_quant else "")

    def code_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the codes of a weight [out, in]."""
        return -(-shape[0] * shape[1] * BITS[self.quant_type] // 8)

    def constant_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of its constants, their own constants included."""
        blocks = shape[0] if self.block_size is None else -(-shape[0] * shape[1] // self.block_size)
        return blocks + 4 * -(-blocks // NESTED_BLOCK) if self.double_quant else 4 * blocks

    def held_bytes(self, shape: tuple[int, int]) -> int:
        """All that a layer holds: codes, constants and, with double quantization, the map of 256 values (1 KiB)."""
        return self.code_bytes(shape) + self.constant_bytes(shape) + (_MAP_BYTES if self.double_quant else 0)


@dataclass(frozen=True)
class Sums:
    """Running sums in fp64 over weights w and errors e = w - q, from which every figure follows."""

    count: int = 0
    w: float = 0.0
    ww: float = 0.0
    e: float = 0.0
    ee: float = 0.0
    we: float = 0.0
    largest: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        added = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return Sums(**added | {"largest": max(self.largest, other.largest)})

    def figures(self) -> "Errors":
        """Mean, maximum, correlation and ratio."""
        spread = self.ww - self.w**2 / self.count
        between = spread - (self.we - self.w * self.e / self.count)
        q = self.w - self.e
        spread_q = self.ww - 2 * self.we + self.ee - q**2 / self.count
        correlation = between / math.sqrt(spread * spread_q) if min(spread, spread_q) > 0 else None
        snr = 10 * math.log10(self.ww / self.ee) if self.ww > 0 and self.ee > 0 else None
        return Errors(self.count, self.ee / self.count, self.largest, correlation, snr)


@dataclass(frozen=True)
class Errors:
    """What a format does to some weights. `snr_db` is 10 log10(sum w^2 / sum e^2): None where nothing was lost;
    `correlation` is Pearson's: None where the weights don't vary."""

    parameters: int
    mse: float
    max_error: float
    correlation: float | None
    snr_db: float | None


@dataclass(frozen=True)
class FormatErrors:
    """One format over a model's quantized layers.

    bits_per_parameter  codes and constants; `held_bytes` has the maps of double quantization besides
    by_kind             by the layers' last name: q_proj, down_proj
    normal_snr_db       the same format's ratio on normally distributed weights
    """

    format: Packing
    bits_per_parameter: float
    held_bytes: int
    whole: Errors
    by_kind: dict[str, Errors]
    normal_snr_db: float | None


def sweep(block_sizes: Sequence[int] = BLOCK_SIZES) -> list[Packing]:
    """Every data type, block size, and way to hold constants; then the textbook's float, and int8 by row."""
    wise = [Packing(name, size, double) for name in SWEPT for double in (False, True) for size in block_sizes]
    return [*wise, Packing("e2m1", 64), Packing("int8", None)]


def dequantized(weight: Tensor, format: Packing) -> Tensor:
    """The weight [out, in] after a way there and back, in its own type."""
    return _there_and_back(weight.float(), format)(0, len(weight)).to(weight.dtype)


def measure(weight: Tensor, format: Packing) -> Sums:
    """The errors of one weight [out, in]. Raises ValueError for one that cannot be quantized (NaN, infinity)."""
    rows = _there_and_back(weight, format)
    sums, step = Sums(), max(1, AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        stop = min(start + step, len(weight))
        sums += _compare(weight[start:stop], rows(start, stop))
    return sums


def normal_weights() -> Tensor:
    """A million normally distributed values in bf16's precision, always the same: what NF4 was made for."""
    return torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).bfloat16().float()


def _compare(weight: Tensor, values: Tensor) -> Sums:
    w = weight.reshape(-1).double()
    e = w - values.reshape(-1).double()
    return Sums(
        w.numel(), float(w.sum()), float(w.dot(w)), float(e.sum()), float(e.dot(e)), float(w.dot(e)),
        float(e.abs().amax()),
    )  # fmt: skip


def _there_and_back(weight: Tensor, format: Packing) -> Rows:
    weight = weight.float()
    columns = slice(0, weight.shape[1])
    if format.block_size is None:
        by_row = pack_int8(weight)
        return lambda start, stop: by_row.panel(slice(start, stop), columns)
    if format.quant_type in LEVELS:
        return _whole_numbers(weight, format.quant_type, format.block_size, format.double_quant)
    packed = pack_4bit(weight, format.quant_type, format.block_size, format.double_quant)
    return lambda start, stop: packed.panel(slice(start, stop), columns)


def _whole_numbers(weight: Tensor, quant_type: str, block_size: int, double_quant: bool) -> Rows:
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity and cannot be quantized")
    codes, absmax = quantize_to_numbers(weight, quant_type, block_size)
    if double_quant:
        absmax = dequantize_constants(*quantize_constants(absmax))
    width, levels = weight.shape[1], LEVELS[quant_type]

    def rows(start: int, stop: int) -> Tensor:
        first = start * width // block_size
        constants = absmax[first : -(-stop * width // block_size)].repeat_interleave(block_size)
        constants = constants[start * width - first * block_size :][: (stop - start) * width]
        return (codes[start * width : stop * width] * (constants / levels)).view(-1, width)

    return rows


def quantize_to_numbers(weight: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """fp32 values of any shape -> codes [n] int8 and block constants [ceil(n / block_size)] fp32, of a type in LEVELS.
    Halves go to the even code."""
    parts = weight.reshape(-1).split(AT_ONCE)  # blocks of every size end where a part does
    codes, constants = zip(*(_quantize_part(part, quant_type, block_size) for part in parts))
    return torch.cat(codes), torch.cat(constants)


def _quantize_part(values: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (LEVELS[quant_type] / absmax.clamp(min=_SMALLEST))[:, None]
    if quant_type == "e2m1":
        step = 1.0 + (scaled.abs() > 4) + 2.0 * (scaled.abs() > 8)
        scaled = scaled.div_(step).round_().mul_(step)
    return scaled.round_().to(torch.int8).view(-1)[:count], absmax
