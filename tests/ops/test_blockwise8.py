"""8-bit block-wise quantization against bitsandbytes' CPU library, bit for bit."""

import pytest
import torch
from torch import Tensor

from topwork.ops.blockwise8 import dequantize_blockwise, dynamic_map, quantize_blockwise, rounding_table

SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@pytest.fixture(scope="module")
def functional():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is the reference of this test")
    from bitsandbytes import functional

    return functional


def between_codes(code: Tensor) -> Tensor:
    """Every tie of two codes and its neighbours in fp32, after a 1 that makes absmax one."""
    ties = (code[1:] + code[:-1]) / 2
    one = torch.ones_like(ties)
    return torch.cat([torch.ones(1), ties, ties.nextafter(one), ties.nextafter(-one)])


def cases(code: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    steps = 2 * torch.arange(65536.0) / 65535 - 1
    return {
        "normal": torch.randn(1 << 16),
        "cubed": torch.randn(40_000) ** 3,
        "odd shape": torch.randn(1001, 7),
        "one value": torch.tensor([3.0]),
        "zeros": torch.zeros(300),
        "a block of zeros": torch.cat([torch.zeros(256), torch.randn(100)]),
        "zeros in a block": torch.randn(600) * (torch.rand(600) > 0.5),
        "one magnitude": torch.full((513,), -0.3),
        "ties of codes": between_codes(code),
        "ties of steps": torch.cat([torch.ones(1), steps + 1 / 65535, steps]),
        "largest": torch.randn(1000).clamp(-1, 1) * 3.4e38,
        "denormal": torch.randn(1000) * 1e-41,
        "one end denormal": torch.randn(512) * torch.tensor([1e-39, 1.0]).repeat(256),
        "bfloat16": torch.randn(5000).bfloat16(),
        "float16": torch.randn(5000).half(),
    }


@SIGNED
def test_the_map_is_bitsandbytes(functional, signed: bool) -> None:
    assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed))


@SIGNED
@pytest.mark.parametrize("block_size", [64, 100, 256, 4096, 1 << 17])
def test_codes_constants_and_values_are_bitsandbytes(functional, signed: bool, block_size: int) -> None:
    code = dynamic_map(signed)
    for name, given in cases(code).items():
        x = given if signed else given.abs()
        codes, absmax = quantize_blockwise(x, code, block_size)
        expected, state = functional.quantize_blockwise(x, code.clone(), blocksize=block_size)
        assert torch.equal(codes, expected), name
        assert torch.equal(absmax, state.absmax), name
        values = dequantize_blockwise(codes, absmax, code, block_size)
        theirs = functional.dequantize_blockwise(expected, absmax=state.absmax, code=code.clone(), blocksize=block_size)
        assert torch.equal(values.view(torch.int32), theirs.view(torch.int32)), name


@SIGNED
def test_every_code_comes_back(signed: bool) -> None:
    """A code that 65,536 even steps can tell from its neighbours is its own nearest."""
    code = dynamic_map(signed)
    codes, absmax = quantize_blockwise(code, code, 256)
    assert absmax.tolist() == [1.0]
    apart = torch.minimum(code.diff(prepend=code[:1] - 1), code.diff(append=code[-1:] + 1)) > 2 / 65535
    assert torch.equal(codes[apart].int(), torch.arange(256, dtype=torch.int32)[apart])
    assert apart.sum() > 220


def test_a_table_given_is_the_table_made() -> None:
    code, x = dynamic_map(False), torch.rand(1000)
    made, given = quantize_blockwise(x, code, 256), quantize_blockwise(x, code, 256, rounding_table(code))
    assert torch.equal(made[0], given[0])
    assert torch.equal(made[1], given[1])


def test_nothing_is_quantized_to_nothing() -> None:
    codes, absmax = quantize_blockwise(torch.empty(0, 3), dynamic_map(True), 256)
    assert codes.shape == (0, 3)
    assert absmax.shape == (0,)
    assert dequantize_blockwise(codes, absmax, dynamic_map(True), 256).shape == (0, 3)
