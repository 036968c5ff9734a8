"""Triton kernels of a layer and of the loss: the truth in the interpreter, sound as compiled, the truth on a GPU."""

import inspect
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

from topwork.ops import gated, norm, rotary
from topwork.ops.logprobs import logprob_slope_, logprob_slope_reference
from topwork.ops.native import load as native
from topwork.ops.triton import load

CASES = Path(__file__).with_name("triton_layer_cases.py")
FAMILIES = {"norm": 140, "rotate": 100, "gated": 36, "drop": 36, "loss": 45}
"""How many cases each has."""
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_in_the_interpreter_the_kernels_are_the_truth(triton, interpreted) -> None:
    lines = interpreted(CASES)
    assert len(lines) == sum(FAMILIES.values())
    assert [line for line in lines if not line.endswith(": as the truth")] == []


OPTIONS = {
    "_rms_norm": {"KNOWN": False, "UNIT_OFFSET": False, "ROWS": 1, "WIDTH": 4096},
    "_rms_norm_backward": {"UNIT_OFFSET": False, "ROWS": 1, "WIDTH": 4096},
    "_rotate": {"INVERSE": False, "HEADS": 32, "HALF": 64},
    "_gated": {"KIND": "silu", "COLUMNS": 1024},
    "_gated_backward": {"KIND": "silu", "COLUMNS": 1024},
    "_drop": {"ADD": True, "COLUMNS": 1024},
    "_logprob_slope": {"COLUMNS": 8192},
}
FP32, LONG = ("rstd", "cos", "sin", "gradient", "logps"), ("targets", "draws")
NUMBERS = {
    "x_outer", "x_inner", "dy_outer", "dy_inner", "inner", "rows", "d", "by_token", "by_head",
    "heads", "blocks", "cos_row", "sin_row", "half", "gate_row", "up_row", "dh_row", "dgate_row", "dup_row", "f",
    "chunks", "row_stride", "vocabulary", "x_row", "y_row",
}  # fmt: skip


def ptx(name: str, **options: object) -> str:
    """A kernel of bf16 values for compute capability 9.0, pointers and numbers multiples of 16. No GPU is needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from topwork.ops.triton import layer, logprobs

    kernel, chosen = getattr(layer, name, None) or getattr(logprobs, name), OPTIONS[name] | options
    types = {key: "constexpr" if key in chosen else "*bf16" for key in kernel.arg_names}
    types |= {key: "*fp32" for key in FP32 if key in types} | {key: "*i64" for key in LONG if key in types}
    types |= {key: "i32" for key in NUMBERS if key in types} | {key: "fp32" for key in ("eps", "scale") if key in types}
    types |= {key: "i64" for key in ("key", "least") if key in types}
    sixteens = {
        (at,): [["tt.divisibility", 16]] for at, key in enumerate(kernel.arg_names) if types[key][0] in "*i"
    }  # fmt: skip
    values = 1
    for key in ("ROWS", "WIDTH", "HEADS", "HALF", "COLUMNS"):
        values *= chosen.get(key, 1)
    source = ASTSource(kernel, types, constexprs=chosen, attrs=sixteens)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=layer.launch(values)).asm["ptx"]


@pytest.fixture
def triton_cache(triton, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_compiled_kernel_moves_memory_in_large_pieces(triton_cache, name: str) -> None:
    """16 bytes at a time, but for what there is once a row or a token; bf16 rounded to the nearest."""
    made = ptx(name)
    assert "ld.global.v4.b32" in made
    assert "st.global.v4.b32" in made
    assert not re.search(r"st\.global\.(v2\.)?b(8|16)\b", made)
    assert "cvt.rn.bf16" in made


@pytest.mark.parametrize("kind", gated.KINDS)
@pytest.mark.parametrize("name", ["_gated", "_gated_backward"])
def test_every_kind_of_gated_unit_compiles(triton_cache, name: str, kind: str) -> None:
    assert "st.global.v4.b32" in ptx(name, KIND=kind)


@pytest.mark.parametrize("name", ["_rms_norm", "_rotate"])
def test_what_equals_the_truth_is_not_fused(triton_cache, name: str) -> None:
    """A product and a sum are rounded each for itself, as in plain torch."""
    assert "fma.rn.f32" not in ptx(name)


def test_tensors_on_the_cpu_are_no_business_of_these() -> None:
    assert load.kernels("layer", torch.empty(1)) is None


class OnGpu:
    """What the dispatch asks of a tensor."""

    is_cuda = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def test_without_triton_plain_torch_serves_and_it_is_said_once(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "topwork.ops.triton.layer", None)
    load.module.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(2):
                assert load.kernels("layer", OnGpu(torch.bfloat16)) is None
    finally:
        load.module.cache_clear()
    assert [str(warning.message).partition(" is not")[0] for warning in told] == ["triton"]


def test_types_and_names(triton) -> None:
    for dtype in load.FLOATS:
        assert load.kernels("layer", OnGpu(dtype)).__name__ == "topwork.ops.triton.layer"
        assert load.kernels("logprobs", OnGpu(dtype)).__name__ == "topwork.ops.triton.logprobs"
    assert load.kernels("layer", OnGpu(torch.float64)) is None


class Recorder:
    """Stands for a module of kernels: notes what each is given by name, if it can take that."""

    def __init__(self, module) -> None:
        self.module, self.given = module, {}

    def __getattr__(self, name: str):
        def called(*values: object) -> str:
            self.given[name] = inspect.signature(getattr(self.module, name)).bind(*values).arguments
            return name

        return called


def test_the_kernels_are_given_what_they_take(triton, monkeypatch) -> None:
    from topwork.ops.triton import layer, logprobs

    recorders = {"layer": Recorder(layer), "logprobs": Recorder(logprobs)}
    monkeypatch.setattr(load, "kernels", lambda name, _: recorders[name])
    x, weight, cos, sin = (torch.randn(shape) for shape in [(6, 4, 8), 8, (6, 8), (6, 8)])
    dy, rstd = torch.randn(6, 4, 8), torch.ones(24)
    dh, gate, up = (torch.randn(6, 8) for _ in range(3))
    dgate, dup, targets, gradient = torch.randn(6, 8), torch.randn(6, 8), torch.arange(6), torch.ones(6)
    monkeypatch.setattr(native, "library", lambda _: None)
    assert norm.rms_norm(x, weight, 1e-5, True) == "rms_norm"
    assert norm.rms_normalized(x, weight, rstd, True) == "rms_normalized"
    assert norm.rms_norm_backward(dy, x, weight, rstd, True) == "rms_norm_backward"
    rotary.rotate_(x, cos, sin, True)
    assert gated.gated(gate, up, "gelu") == "gated"
    assert gated.gated_backward(dh, gate, up, "gelu", (dgate, dup)) == (dgate, dup)
    assert logprob_slope_(gate, targets, gradient, 0.5) == "logprob_slope_"
    norms = {"x": x, "weight": weight, "unit_offset": True}
    expected = {
        "rms_norm": norms | {"eps": 1e-5},
        "rms_normalized": norms | {"rstd": rstd},
        "rms_norm_backward": norms | {"rstd": rstd, "dy": dy},
        "rotate_": {"x": x, "cos": cos, "sin": sin, "inverse": True},
        "gated": {"gate": gate, "up": up, "kind": "gelu"},
        "gated_backward": {"dh": dh, "gate": gate, "up": up, "kind": "gelu", "dgate": dgate, "dup": dup},
        "logprob_slope_": {"logits": gate, "targets": targets, "gradient": gradient, "scale": 0.5},
    }
    given = recorders["layer"].given | recorders["logprobs"].given
    assert set(given) == set(expected)
    for name, values in expected.items():
        assert {key: id(value) for key, value in given[name].items()} == {
            key: id(value) for key, value in values.items()
        }


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_the_kernels_are_the_truth(triton, monkeypatch, family: str) -> None:
    monkeypatch.syspath_prepend(str(CASES.parent))
    from triton_layer_cases import cases

    found = list(cases(family, torch.device("cuda"), interpreted=False))
    assert len(found) == FAMILIES[family]
    assert [(name, far) for name, far in found if far > 1] == []


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", load.FLOATS)
def test_on_a_gpu_every_function_goes_to_its_kernel(triton, monkeypatch, dtype: torch.dtype) -> None:
    """With the truths out of the way, and without waiting for the GPU."""
    made = {"device": "cuda", "dtype": dtype}
    x, weight, table = torch.randn(6, 4, 64, **made), torch.randn(64, **made), torch.rand(6, 64, device="cuda")
    gate, targets, ones = torch.randn(6, 64, **made), torch.arange(6, device="cuda"), torch.ones(6, device="cuda")
    for module in (norm, rotary, gated):
        for name in [name for name in vars(module) if "_reference" in name]:
            monkeypatch.setattr(module, name, None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, rstd = norm.rms_norm(x, weight, 1e-5)
        norm.rms_normalized(x, weight, rstd)
        norm.rms_norm_backward(x, x, weight, rstd)
        rotary.rotate_(x, table, table)
        gated.gated(gate, gate, "silu")
        gated.gated_backward(gate, gate, gate, "silu")
        logprob_slope_(gate, targets, ones)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@GPU
def test_on_a_gpu_offsets_pass_two_to_the_thirty_first(triton) -> None:
    """The last row of logits that lie beyond it."""
    logits = torch.zeros(16800, 128256, device="cuda", dtype=torch.bfloat16)
    logits[-1].normal_()
    targets, ones = torch.full((len(logits),), 5, device="cuda"), torch.ones(len(logits), device="cuda")
    expected, slope = logprob_slope_reference(logits[-1:].clone(), targets[-1:], ones[-1:])
    found = logprob_slope_(logits, targets, ones)
    torch.testing.assert_close(found[-1:], expected)
    torch.testing.assert_close(logits[-1:], slope)
    torch.testing.assert_close(found[0], -torch.tensor(128256.0, device="cuda").log())
