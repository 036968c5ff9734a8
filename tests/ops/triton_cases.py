"""Panels unpacked as on a GPU and by the truth: on a CUDA device compiled, on the CPU in Triton's interpreter.

`python triton_cases.py`, with TRITON_INTERPRET=1, prints one line for each case: its name and whether the values are
equal. The interpreter has to be asked for before triton is imported anywhere, hence a process of its own.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from topwork.ops import quantize
from topwork.ops.packed import pack_4bit, pack_int8

Panel = tuple[int, int, int, int]
SHAPES = [(1, 1), (7, 9), (3, 4097), (33, 65), (64, 96), (5, 2080)]
LAYOUTS = [("nf4", 32, False), ("nf4", 64, True), ("fp4", 64, False), ("fp4", 4096, True)]
"""Types, block sizes, and whether the constants are held in 8 bits."""


def panels(rows: int, columns: int) -> list[Panel]:
    half, third = rows // 2, columns // 3
    return [
        (0, rows, 0, columns), (half, rows, 0, columns), (half, rows, third, columns), (0, rows, columns - 1, columns),
        (0, rows, 0, columns // 2), (0, 0, 0, columns),
    ]  # fmt: skip


def cases(device: torch.device, interpreted: bool) -> Iterator[tuple[str, bool]]:
    """(name, whether the kernel's values are the truth's), for every type, block size, shape, panel and rounding."""
    torch.manual_seed(0)
    for dtype in quantize.FLOATS:
        for shape in SHAPES if dtype == torch.float32 else SHAPES[3:5]:
            weight = torch.randn(shape)
            for quant_type, block_size, double in LAYOUTS:
                packed = pack_4bit(weight, quant_type, block_size, double).to(device)
                same = all(
                    equal(
                        quantize._dequantize_4bit_cuda, quantize.dequantize_4bit_reference,
                        (packed.codes, packed.absmax, packed.nested_absmax, packed.nested_code, packed.offset,
                         quant_type, block_size, shape[1], *panel), dtype, interpreted,
                    )
                    for panel in panels(*shape)
                )  # fmt: skip
                yield f"{quant_type} {block_size} double={double} {shape} {dtype}", same
            packed8 = pack_int8(weight).to(device)
            given = (packed8.codes, packed8.absmax)
            yield (
                f"int8 {shape} {dtype}",
                all(
                    equal(
                        quantize._dequantize_int8_cuda, quantize.dequantize_int8_reference, (*given, *panel),
                        dtype, interpreted,
                    )
                    for panel in panels(*shape)
                ),
            )  # fmt: skip


def equal(kernel, truth, given: tuple, dtype: torch.dtype, interpreted: bool) -> bool:
    found = kernel(*given, dtype)
    return torch.equal(found, expected(truth, given, dtype, interpreted)) and found.dtype == dtype


def expected(truth, given: tuple, dtype: torch.dtype, interpreted: bool) -> Tensor:
    """The truth; but Triton's interpreter cuts fp32 off to bf16 where the GPU rounds to the nearest (`cvt.rn`)."""
    if interpreted and dtype == torch.bfloat16:
        return (truth(*given, torch.float32).view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16()
    return truth(*given, dtype)


if __name__ == "__main__":
    for name, same in cases(torch.device("cpu"), interpreted=True):
        print(f"{name}: {'equal' if same else 'DIFFERENT'}")
