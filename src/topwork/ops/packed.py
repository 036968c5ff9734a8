"""Weights held in 4 or 8 bits, in bitsandbytes' formats, and the dense panels made of them.

nf4, fp4   a block of `block_size` values (counted row by row) shares one constant, its largest magnitude:
           value = code[nibble] * constant. Double quantization holds the constants themselves in 8 bits:
           constant = nested_code[byte] * nested_absmax[block // 256] + offset
int8       value = byte * absmax[row] / 127

The sixteen NF4 codes are the quantiles of a normal distribution (Dettmers et al., arXiv 2305.14314, appendix E). At
block size 64 a parameter costs 4.5 bits, with double quantization 4.127: 4 + 8/64 + 32/(64 * 256).
"""

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from topwork.ops.blockwise8 import dequantize_blockwise, dynamic_map, quantize_blockwise, rounding_table
from topwork.ops.quantize import (
    dequantize_4bit,
    dequantize_4bit_cpu,
    dequantize_int8,
    dequantize_int8_cpu,
    quantize_4bit,
    quantize_int8,
    rows_4bit,
)

NESTED_BLOCK = 256
"""Constants that share one constant of their own, with double quantization."""


@dataclass(frozen=True)
class Packed:
    """A weight [out, in] in few bits, and how it was in more."""

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    """The type it was quantized from, and in which it comes back."""

    @property
    def nbytes(self) -> int:
        """All that is held: codes and constants."""
        held = (getattr(self, field.name) for field in fields(self))
        return sum(value.nbytes for value in held if isinstance(value, Tensor))

    @property
    def kind(self) -> str:
        """How people call it."""
        raise NotImplementedError

    def panel(self, rows: slice, columns: slice) -> Tensor:
        """Some rows and columns [r, c], dense, in `dtype`; inside of `scratch_scope` gone when that ends."""
        raise NotImplementedError

    def rows(self, index: Tensor) -> Tensor:
        """Chosen rows [n, in] of the weight, dense, in `dtype`."""
        raise NotImplementedError

    def write(self, out: Tensor) -> None:
        """The whole weight, dense, to contiguous out [out, in] of `dtype` on its CPU."""
        found = self._written(out)
        if found is not out:
            out.copy_(found)

    def _written(self, out: Tensor) -> Tensor:
        """To `out`, or elsewhere."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The whole weight [out, in], in `dtype`."""
        return self.panel(slice(0, self.shape[0]), slice(0, self.shape[1]))

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Packed4bit(Packed):
    """codes [ceil(n / 2)] uint8, the first of two values in the high nibble; absmax [blocks] fp32, or uint8 where
    nested_absmax [ceil(blocks / 256)] fp32, nested_code [256] and offset say what its bytes mean."""

    quant_type: str
    block_size: int
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: float = 0.0

    @property
    def kind(self) -> str:
        doubly = "" if self.nested_absmax is None else " with double quantization"
        blocks = "" if self.block_size == 64 else f" in blocks of {self.block_size}"
        return f"{self.quant_type}{blocks}{doubly}"

    def panel(self, rows: slice, columns: slice) -> Tensor:
        return dequantize_4bit(
            self.codes, self.absmax, self.nested_absmax, self.nested_code,
            self.offset, self.quant_type, self.block_size, self.shape[1],
            rows.start, rows.stop, columns.start, columns.stop, self.dtype,
        )  # fmt: skip

    def _written(self, out: Tensor) -> Tensor:
        return dequantize_4bit_cpu(
            self.codes, self.absmax, self.nested_absmax, self.nested_code, self.offset, self.quant_type,
            self.block_size, self.shape[1], 0, self.shape[0], 0, self.shape[1], self.dtype, out,
        )  # fmt: skip

    def rows(self, index: Tensor) -> Tensor:
        return rows_4bit(
            index, slice(0, self.shape[1]), self.codes, self.absmax, self.nested_absmax, self.nested_code, self.offset,
            self.quant_type, self.block_size, self.shape[1], self.dtype,
        )  # fmt: skip


@dataclass(frozen=True)
class PackedInt8(Packed):
    """codes [out, in] int8, absmax [out] fp32."""

    @property
    def kind(self) -> str:
        return "int8"

    def panel(self, rows: slice, columns: slice) -> Tensor:
        return dequantize_int8(
            self.codes, self.absmax, rows.start, rows.stop, columns.start, columns.stop, self.dtype
        )  # fmt: skip

    def _written(self, out: Tensor) -> Tensor:
        return dequantize_int8_cpu(self.codes, self.absmax, 0, self.shape[0], 0, self.shape[1], self.dtype, out)

    def rows(self, index: Tensor) -> Tensor:
        chosen = PackedInt8(self.codes[index], self.absmax[index], (len(index), self.shape[1]), self.dtype)
        return chosen.dense()


def pack_4bit(weight: Tensor, quant_type: str, block_size: int, double_quant: bool) -> Packed4bit:
    """Quantize a weight [out, in] of a 16- or 32-bit type. Raises ValueError for a type or block size that
    bitsandbytes cannot read, and for values that are not finite."""
    codes, absmax = quantize_4bit(weight, quant_type, block_size)
    shape = (weight.shape[0], weight.shape[1])
    if not double_quant:
        return Packed4bit(codes, absmax, shape, weight.dtype, quant_type, block_size)
    nested = quantize_constants(absmax)
    return Packed4bit(codes, nested[0], shape, weight.dtype, quant_type, block_size, *nested[1:])


def quantize_constants(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Double quantization: block constants [blocks] fp32 -> bytes [blocks], nested_absmax, nested_code, offset."""
    code, table = _nested_map(str(absmax.device))
    offset = absmax.mean()
    return *quantize_blockwise(absmax - offset, code, NESTED_BLOCK, table), code, float(offset)


def dequantize_constants(codes: Tensor, nested_absmax: Tensor, nested_code: Tensor, offset: float) -> Tensor:
    """What the bytes of double quantization stand for: block constants [blocks] fp32."""
    return dequantize_blockwise(codes, nested_absmax, nested_code, NESTED_BLOCK) + offset


@cache
def _nested_map(device: str) -> tuple[Tensor, Tensor]:
    code = dynamic_map(signed=True).to(device)
    return code, rounding_table(code)


def pack_int8(weight: Tensor) -> PackedInt8:
    """Quantize a weight [out, in], each row by its own largest magnitude."""
    codes, absmax = quantize_int8(weight)
    return PackedInt8(codes, absmax, (weight.shape[0], weight.shape[1]), weight.dtype)


def constants(packed: Packed4bit) -> Tensor:
    """The block constants [blocks] in fp32, whether or not they are held in 8 bits."""
    if packed.nested_absmax is None or packed.nested_code is None:
        return packed.absmax
    return dequantize_constants(packed.absmax, packed.nested_absmax, packed.nested_code, packed.offset)
