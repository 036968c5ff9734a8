"""Errors of data types against numpy, against bitsandbytes, and against what is known of normal weights."""

from typing import Any

import numpy as np
import pytest
import torch

from topwork.ops.packed import pack_4bit, pack_int8
from topwork.ops.quantize import BLOCK_SIZES, CODES
from topwork.quantization import error as error_part
from topwork.quantization.error import LEVELS, Packing, Sums, dequantized, measure, normal_weights, sweep

SHAPE = (37, 51)
"""Rows, and values in all, that no block size divides."""
WISE = [(name, size) for name in ("nf4", "fp4", "int4", "int8") for size in (32, 64, 512, 4096)]


def sample(shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16()


def by_hand(weight: torch.Tensor, name: str, size: int) -> np.ndarray[Any, Any]:
    """Block by block: scale by the largest magnitude, take the nearest value that the type has."""
    levels = LEVELS.get(name)
    grid = np.array(CODES[name] if levels is None else np.arange(-levels, levels + 1) / levels, dtype=np.float64)
    if name == "e2m1":
        floats = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
        grid = np.concatenate([floats, -floats])
    flat = weight.double().numpy().ravel()
    blocks = []
    for start in range(0, flat.size, size):
        block = flat[start : start + size]
        largest = np.abs(block).max()
        blocks.append(grid[np.abs(block[:, None] / largest - grid).argmin(1)] * largest)
    return np.concatenate(blocks).reshape(weight.shape)


@pytest.mark.parametrize(("name", "size"), [*WISE, ("e2m1", 64), ("e2m1", 512)])
def test_figures_equal_numpys(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_part, "AT_ONCE", 4096 // 8)  # several parts; blocks of 4096 only in the last case
    if size > 512:
        monkeypatch.setattr(error_part, "AT_ONCE", 4096)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))  # fp32: no ties
    w, q = weight.double().numpy(), by_hand(weight, name, size)
    figures = measure(weight, Packing(name, size)).figures()
    assert figures.parameters == w.size
    assert figures.mse == pytest.approx(((w - q) ** 2).mean(), rel=1e-5)
    assert figures.max_error == pytest.approx(np.abs(w - q).max(), rel=1e-5)
    assert figures.correlation == pytest.approx(np.corrcoef(w.ravel(), q.ravel())[0, 1], rel=1e-7)
    assert figures.snr_db == pytest.approx(10 * np.log10((w**2).sum() / ((w - q) ** 2).sum()), rel=1e-6)


def test_int8_by_row_is_bitsandbytes_int8() -> None:
    w = sample().double().numpy()
    largest = np.abs(w).max(1, keepdims=True)
    expected = ((w - np.round(w / largest * 127) * largest / 127) ** 2).mean()
    assert measure(sample(), Packing("int8", None)).figures().mse == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_double_quantization_equals_bitsandbytes(name: str) -> None:
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is the reference here").functional
    weight = sample((300, 67)).float()
    codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type=name)
    assert torch.equal(dequantized(weight, Packing(name, 64, True)), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_double_quantization_of_uniform_types(name: str) -> None:
    """Codes stay; constants are within what 8 bits of their deviation from the mean allow."""
    weight, levels = sample((300, 64)).float(), LEVELS[name]
    codes = dequantized(weight, Packing(name, 64)) / weight.abs().amax(1, keepdim=True)
    constants = dequantized(weight, Packing(name, 64, True)) / codes
    exact = weight.abs().amax(1, keepdim=True).expand_as(weight)
    used = codes.abs() > 0.5 / levels
    difference = (constants - exact)[used].abs().max()
    assert 0 < difference < 0.04 * (exact - exact.mean()).abs().max()


@pytest.mark.parametrize("shape", [SHAPE, (64, 64), (1, 7), (130, 96)])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_held_bytes_are_what_a_packed_weight_holds(shape: tuple[int, int], double_quant: bool, size: int) -> None:
    packed = pack_4bit(sample(shape), "nf4", size, double_quant)
    assert Packing("nf4", size, double_quant).held_bytes(shape) == packed.nbytes


def test_held_bytes_of_int8() -> None:
    assert Packing("int8", None).held_bytes(SHAPE) == pack_int8(sample()).nbytes
    assert Packing("int8", 64).held_bytes((64, 64)) == 64 * 64 + 4 * 64
    assert Packing("int4", 64).held_bytes((64, 64)) == 64 * 64 // 2 + 4 * 64


@pytest.mark.parametrize(
    ("form", "bits"),
    [
        (Packing("nf4", 64), 4.5),
        (Packing("nf4", 64, True), 4.127),
        (Packing("int4", 32), 5.0),
        (Packing("fp4", 4096), 4.008),
        (Packing("int8", 128), 8.25),
    ],
)
def test_bits_per_parameter(form: Packing, bits: float) -> None:
    shape = (4096, 4096)
    assert 8 * (form.code_bytes(shape) + form.constant_bytes(shape)) / 4096**2 == pytest.approx(bits, abs=5e-4)


def test_nf4_is_the_best_4_bit_type_for_normal_weights_at_every_block_size() -> None:
    for size in BLOCK_SIZES:
        mse = {name: measure(normal_weights(), Packing(name, size)).figures().mse for name in ("nf4", "fp4", "int4")}
        assert mse["nf4"] < 0.85 * min(mse["fp4"], mse["int4"]), size


def test_fp4_loses_to_uniform_int4_on_normal_weights_until_blocks_are_long() -> None:
    """bitsandbytes' FP4 spends three codes around zero; the textbook's, which doesn't, stands where theory has it."""
    ratio = {
        size: measure(normal_weights(), Packing("fp4", size)).ee / measure(normal_weights(), Packing("int4", size)).ee
        for size in (64, 1024, 4096)
    }
    assert ratio[64] > 1.2 > 1.1 > ratio[1024] > ratio[4096]
    assert ratio[4096] == pytest.approx(1.0, abs=0.02)
    mse = {name: measure(normal_weights(), Packing(name, 64)).figures().mse for name in ("nf4", "e2m1", "int4", "fp4")}
    assert list(mse) == sorted(mse, key=lambda name: mse[name])


def test_error_grows_with_the_block_and_barely_with_double_quantization() -> None:
    mse = [measure(normal_weights(), Packing("nf4", size)).figures().mse for size in BLOCK_SIZES]
    assert mse == sorted(mse)
    plain, double = (measure(normal_weights(), Packing("nf4", 64, double)).ee for double in (False, True))
    assert plain < double < 1.002 * plain


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    form = Packing("int4", 32)
    weight = sample((64, 32))
    parts = measure(weight[:24], form) + measure(weight[24:], form)
    whole = measure(weight, form)
    assert parts.count == whole.count
    assert parts.largest == whole.largest
    assert (parts.ee, parts.we, parts.ww) == pytest.approx((whole.ee, whole.we, whole.ww), rel=1e-12)


@pytest.mark.parametrize("form", [Packing(*wise) for wise in WISE[::4]] + [Packing("int8", None)], ids=lambda f: f.name)
def test_zeros_come_back_exactly_and_say_so(form: Packing) -> None:
    figures = measure(torch.zeros(8, 64), form).figures()
    assert (figures.mse, figures.max_error, figures.snr_db, figures.correlation) == (0.0, 0.0, None, None)


@pytest.mark.parametrize("form", [Packing(*wise) for wise in WISE[::4]] + [Packing("int8", None)], ids=lambda f: f.name)
def test_values_that_are_not_finite_are_refused(form: Packing) -> None:
    weight = torch.ones(4, 64)
    weight[2, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        measure(weight, form)


def test_the_sweep_has_every_type_size_and_both_ways_to_hold_constants() -> None:
    formats = sweep()
    assert len(set(formats)) == len(formats) == 4 * len(BLOCK_SIZES) * 2 + 2
    assert Packing("int8", None) in formats


def test_a_weight_comes_back_in_its_own_type() -> None:
    back = dequantized(sample(), Packing("int4", 64))
    assert back.dtype == torch.bfloat16
    assert back.shape == SHAPE
    assert Sums().count == 0
