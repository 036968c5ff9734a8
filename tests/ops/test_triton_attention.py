"""The Triton kernels of attention: the truth in the interpreter, sound as compiled, the truth on a GPU."""

import inspect
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from topwork.ops.attention_reference import AttentionRule

CASES = Path(__file__).with_name("triton_attention_cases.py")
COUNT = 43
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
KERNELS = ("attend", "attend_backward_queries", "attend_backward_keys")
HOPPER = 227 * 1024
"""Bytes of shared memory that a block can have."""


@pytest.mark.slow
def test_in_the_interpreter_the_kernels_are_the_truth(triton, interpreted) -> None:
    lines = interpreted(CASES)
    assert len(lines) == COUNT
    assert [line for line in lines if not line.endswith(": as the truth")] == []


def test_the_table_names_every_block_once_and_the_longest_first(triton) -> None:
    from topwork.ops.triton.attention import work

    bounds = (0, 0, 300, 301, 429, 429)
    table, count = work(bounds, 128, torch.device("cpu"))
    assert table.tolist() == [
        [0, 300, 256, 0], [0, 300, 128, 128], [0, 300, 0, 256], [300, 1, 0, 0], [301, 128, 0, 0],
    ]  # fmt: skip
    assert count == 5
    assert work(bounds, 128, torch.device("cpu"))[0] is table


class Kernel:
    """Stands for one: takes what it takes, and notes that it was launched."""

    def __init__(self, kernel, launched: list[tuple[str, int]]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: tuple[int]):
        def launch(*values: object, num_warps: int = 4, num_stages: int = 3, **options: object) -> None:
            inspect.signature(self.kernel.fn).bind(*values, **options)
            self.launched.append((self.kernel.fn.__name__, *grid))

        return launch


@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_layer_is_one_launch_forward_and_two_backward(triton, monkeypatch, with_sinks: bool) -> None:
    """And one more for sinks; a layer after it makes no table."""
    from topwork.ops.triton import attention

    launched: list[tuple[str, int]] = []
    for name in (*KERNELS, "attend_backward_sinks"):
        monkeypatch.setattr(attention, name, Kernel(getattr(attention, name), launched))
    grad, query, key, value = (torch.randn(300, heads, 64).bfloat16() for heads in (6, 6, 2, 2))
    sinks = torch.randn(6) if with_sinks else None
    attention.work.cache_clear()
    for window in (None, 7):
        rule, bounds = AttentionRule(0.1, window), (0, 20, 300)
        out, lse = attention.attention(query, key, value, bounds, rule, sinks)
        into = tuple(torch.empty_like(x) for x in (query, key, value))
        attention.attention_backward(grad, query, key, value, out, lse, bounds, rule, sinks, into)
    layer = [("attend", 24), ("attend_backward_queries", 24), ("attend_backward_keys", 8)]
    assert launched == 2 * (layer + [("attend_backward_sinks", 6)] * with_sinks)
    assert attention.work.cache_info().misses == 1


class Compiled(NamedTuple):
    ptx: str
    shared: int


def compiled(name: str, kind: str = "bf16", size: int = 128, window: bool = False, capped: bool = False) -> Compiled:
    """A kernel for compute capability 9.0, pointers and strides multiples of 16. No GPU is needed."""
    from triton import language as tl
    from triton import next_power_of_2
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from topwork.ops.triton import attention, attention_kernels

    kernel, width = getattr(attention_kernels, name), next_power_of_2(size)
    tiles = attention.THIRTY_TWO_BITS if kind == "fp32" else attention.SIXTEEN_BITS[width]
    forward = name == "attend"
    chosen: dict[str, object] = {
        "SIZE": size, "SIZE_V": size, "WIDTH": width, "WIDTH_V": width, "OWN": tiles.own,
        "STEP": tiles.step if forward else tiles.step_back, "CAPPED": capped, "WINDOW": window, "UNIT": 8,
        "DOT": {"bf16": tl.bfloat16, "fp32": tl.float32}[kind], **({"SINKS": capped} if forward else {}),
    }  # fmt: skip
    kinds = {"lse": "*fp32", "numbers": "*fp32", "items": "*i32", "scale": "fp32", "cap": "fp32"}
    kinds |= dict.fromkeys(("tokens", "heads", "group", "window"), "i32") | dict.fromkeys(chosen, "constexpr")
    strides = {key for key in kernel.arg_names if key.endswith(("_row", "_head"))}
    types = {key: "i32" if key in strides else kinds.get(key, f"*{kind}") for key in kernel.arg_names}
    sixteens = {
        (at,): [["tt.divisibility", 16]]
        for at, key in enumerate(kernel.arg_names)
        if key in strides or types[key].startswith("*")
    }
    options = {
        "num_warps": tiles.warps if forward else tiles.warps_back,
        "num_stages": tiles.stages if forward else tiles.stages_back,
    }
    source = ASTSource(kernel, types, constexprs=chosen, attrs=sixteens)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return Compiled(str(made.asm["ptx"]), int(made.metadata.shared))


@pytest.fixture
def triton_cache(triton, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("size", [80, 128, 256])
@pytest.mark.parametrize("name", KERNELS)
def test_the_compiled_kernel_multiplies_on_tensor_cores(triton_cache, tmp_path, name: str, size: int) -> None:
    """Hopper's own, from shared memory that is filled 16 bytes at a time; nothing is added to memory in any order, no
    array lives in local memory, and little is spilled there."""
    ptx, shared = compiled(name, size=size)
    assert "wgmma.mma_async.sync.aligned" in ptx
    assert re.search(r"wgmma\S*\.f32\.bf16\.bf16", ptx)
    assert not re.search(r"(?<!g)mma\.sync", ptx)
    assert re.search(r"cp\.async\.cg\.shared\.global.*0x10,", ptx)
    small = len(re.findall(r"cp\.async\.ca\.shared\.global.*0x[48],", ptx))
    assert small <= (
        9 if name == "attend_backward_keys" else 0
    )  # lse and delta, one to a thread in each of three loops
    assert "st.global.v4.b32" in ptx
    assert not re.search(r"\b(ld|st)\.global\.(v2\.)?b(8|16)\b", ptx)
    assert not re.search(r"\b(atom|red)\.", ptx)
    assert ".local" not in ptx
    assert shared <= HOPPER
    assert spilled(ptx, tmp_path) <= 512


def spilled(ptx: str, folder: Path) -> int:
    """Bytes a thread stores for want of registers, by the assembler in triton's package."""
    import triton as package

    assembler = Path(package.__file__).parent / "backends/nvidia/bin/ptxas"
    if not assembler.exists():
        return 0
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [assembler, "-v", "--gpu-name=sm_90a", source, "-o", folder / "kernel.cubin"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return max(int(count) for count in re.findall(r"(\d+) bytes spill stores", told))


@pytest.mark.parametrize("name", KERNELS)
def test_windows_caps_and_sinks_compile(triton_cache, name: str) -> None:
    ptx, shared = compiled(name, size=64, window=True, capped=True)
    assert "wgmma.mma_async.sync.aligned" in ptx
    assert shared <= HOPPER


@pytest.mark.parametrize("name", KERNELS)
def test_fp32_is_not_multiplied_as_tf32(triton_cache, tmp_path, name: str) -> None:
    ptx, shared = compiled(name, "fp32", size=64)
    assert "tf32" not in ptx
    assert "fma.rn.f32" in ptx
    assert shared <= HOPPER
    assert spilled(ptx, tmp_path) <= 512


@pytest.mark.gpu
@GPU
def test_on_a_gpu_the_kernels_are_the_truth(triton, wrong_on_gpu) -> None:
    assert wrong_on_gpu(CASES) == (COUNT, [])
