"""The Triton kernels: equal to the truth in the interpreter, sound as compiled for a GPU, and equal again on one."""

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from topwork.ops import quantize
from topwork.ops.packed import pack_4bit, pack_int8
from topwork.ops.quantized_linear import PANEL_BYTES, quantized_linear
from topwork.ops.triton import load

CASES = Path(__file__).with_name("triton_cases.py")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.slow
def test_in_the_interpreter_the_kernels_are_the_truth(triton, interpreted) -> None:
    lines = interpreted(CASES)
    assert len(lines) == (6 + 2 + 2) * (4 + 1)
    assert [line for line in lines if not line.endswith(": equal")] == []


def compiled(kernel, pointers: dict[str, str], numbers: list[str], options: dict[str, object], fused: bool) -> str:
    """The PTX of a kernel for compute capability 9.0, every pointer and number a multiple of 16. No GPU is needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from topwork.ops.triton.dequantize4 import LAUNCH

    names = kernel.arg_names
    types = {name: pointers.get(name, "i32" if name in numbers else "constexpr") for name in names}
    sixteens = {
        (names.index(name),): [["tt.divisibility", 16]] for name in names if types[name] not in ("constexpr", "fp32")
    }
    source = ASTSource(kernel, types, constexprs=options, attrs=sixteens)
    built = compile(
        source, target=GPUTarget("cuda", 90, 32), options=LAUNCH | ({"enable_fp_fusion": True} if fused else {})
    )
    return built.asm["ptx"]


def unpack_4bit_ptx(out: str, nested: bool, fused: bool = False) -> str:
    from topwork.ops.triton.dequantize4 import GROUPS, _unpack_4bit

    pointers = {
        "codes": "*u8", "absmax": "*u8" if nested else "*fp32", "nested_absmax": "*fp32", "nested_code": "*fp32",
        "offset": "fp32", "code": "*fp32", "out": out,
    }  # fmt: skip
    numbers = ["code_bytes", "start", "in_features", "columns", "groups_a_row", "groups"]
    return compiled(_unpack_4bit, pointers, numbers, {"BLOCK": 64, "NESTED": nested, "GROUPS": GROUPS}, fused)


@pytest.fixture
def triton_cache(triton, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("out", ["*bf16", "*fp16", "*fp32"])
def test_the_compiled_kernel_rounds_and_stores_as_meant(triton_cache, out: str) -> None:
    """What the interpreter cannot show: no product is fused with a sum, denormals are kept, 16-bit results are rounded
    to the nearest, codes are read 8 bytes and results written 16 bytes at a time."""
    for nested in (False, True):
        ptx = unpack_4bit_ptx(out, nested)
        assert "fma" not in ptx
        assert "mad.f32" not in ptx
        assert ".ftz" not in ptx
        assert "mul.rn.f32" in ptx
        assert ("add.rn.f32" in ptx) == nested
        assert "st.global.v4.b32" in ptx
        assert not re.search(r"st\.global\.(v2\.)?b(8|16|32)\b", ptx)
        assert "ld.global.v2.b32" in ptx
        narrow = {"*bf16": "cvt.rn.bf16x2.f32", "*fp16": "cvt.rn.f16x2.f32"}
        assert out == "*fp32" or narrow[out] in ptx


def test_a_product_and_a_sum_would_be_fused_if_the_launch_did_not_forbid_it(triton_cache) -> None:
    assert "fma.rn.f32" in unpack_4bit_ptx("*bf16", nested=True, fused=True)


def test_the_compiled_int8_kernel_rounds_and_stores_as_meant(triton_cache) -> None:
    from topwork.ops.triton.dequantize4 import INT8_COLUMNS, _unpack_int8

    pointers = {"codes": "*i8", "absmax": "*fp32", "out": "*bf16"}
    numbers = ["row", "column", "in_features", "columns", "chunks"]
    ptx = compiled(_unpack_int8, pointers, numbers, {"COLUMNS": INT8_COLUMNS}, False)
    assert "fma" not in ptx
    assert ".ftz" not in ptx
    assert "cvt.rn.bf16x2.f32" in ptx
    assert "st.global.v4.b32" in ptx


def test_without_triton_the_truth_serves_and_it_is_said_once(monkeypatch) -> None:
    """The GPU's functions, called with tensors that plain torch can serve anywhere."""
    monkeypatch.setitem(sys.modules, "topwork.ops.triton.dequantize4", None)
    monkeypatch.delattr("topwork.ops.triton.dequantize4", raising=False)
    load.module.cache_clear()
    packed, packed8 = pack_4bit(torch.randn(5, 70), "nf4", 64, True), pack_int8(torch.randn(5, 70))
    given = (
        packed.codes, packed.absmax, packed.nested_absmax, packed.nested_code, packed.offset, "nf4", 64, 70,
        1, 4, 3, 66, torch.float32,
    )  # fmt: skip
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(2):
                assert torch.equal(quantize._dequantize_4bit_cuda(*given), packed.dense()[1:4, 3:66])
                given8 = (packed8.codes, packed8.absmax, 1, 4, 3, 66, torch.float32)
                assert torch.equal(quantize._dequantize_int8_cuda(*given8), packed8.dense()[1:4, 3:66])
    finally:
        load.module.cache_clear()
    assert [str(warning.message).partition(" is not")[0] for warning in told] == ["triton"]


@pytest.mark.gpu
@GPU
def test_on_a_gpu_the_kernels_are_the_truth(triton) -> None:
    sys.path.insert(0, str(CASES.parent))
    try:
        from triton_cases import cases
    finally:
        sys.path.remove(str(CASES.parent))
    assert [name for name, same in cases(torch.device("cuda"), interpreted=False) if not same] == []


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("shape", [(512, 1024), (300, 333)])
def test_on_a_gpu_values_are_those_of_the_cpu(triton, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).bfloat16()
    for packed in (pack_4bit(weight, "nf4", 64, True), pack_4bit(weight, "fp4", 128, False), pack_int8(weight)):
        assert torch.equal(packed.to(torch.device("cuda")).dense().cpu(), packed.dense())
    on_cpu, on_gpu = pack_4bit(weight, "nf4", 64, False), pack_4bit(weight.cuda(), "nf4", 64, False)
    assert torch.equal(on_gpu.codes.cpu(), on_cpu.codes)
    assert torch.equal(on_gpu.absmax.cpu(), on_cpu.absmax)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("budget", [256 << 20, 1], ids=["one panel", "panels"])
def test_on_a_gpu_the_layer_is_its_dense_twin(triton, monkeypatch, budget: int) -> None:
    monkeypatch.setitem(PANEL_BYTES, "cuda", budget)
    packed = pack_4bit(torch.randn(320, 200).bfloat16(), "nf4", 64, True).to(torch.device("cuda"))
    dy = torch.randn(50, 320, device="cuda", dtype=torch.bfloat16)
    start, found = torch.randn(50, 200, device="cuda", dtype=torch.bfloat16), []
    for layer in (quantized_linear, lambda x, packed: F.linear(x, packed.dense())):
        x = start.clone().requires_grad_()
        y = layer(x, packed)
        y.backward(dy)
        found.append((y.detach(), x.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.016, atol=0.05)
