"""Triton kernels of a layer and of the loss: the truth in the interpreter, sound as compiled, the truth on a GPU."""

import inspect
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from topwork.ops import dropout, gain, gated, norm, residual, rotary
from topwork.ops.logprobs import logprob_slope_, logprob_slope_reference
from topwork.ops.native import load as native
from topwork.ops.triton import load

CASES = Path(__file__).with_name("triton_layer_cases.py")
FAMILIES = {"norm": 140, "rotate": 100, "gated": 36, "drop": 36, "sum": 90, "vector": 72, "loss": 45}
"""How many cases each has."""
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.slow
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
    "_add_and_round": {"ADDS": True, "ROUNDS": True, "VALUES": 2048},
    "_multiply": {"LEAVES": True, "ROWS": 8, "COLUMNS": 256},
    "_add": {"ROWS": 8, "COLUMNS": 256},
    "_gain_sums": {"LEAVES": True, "ROWS": 8, "COLUMNS": 256},
    "_logprob_slope": {"COLUMNS": 8192},
}
SUMS: dict[str, dict[str, object]] = {
    "_column_sums": {"ROWS": 8, "COLUMNS": 256},
    "_total": {"DIVIDES": True, "ROWS": 64, "COLUMNS": 32},
}
"""Which give a number a column."""
FP32 = ("rstd", "cos", "sin", "gradient", "logps", "factor", "amount", "sums", "out", "total")
LONG = ("targets", "draws")
NUMBERS = {
    "x_outer", "x_inner", "dy_outer", "dy_inner", "inner", "rows", "d", "by_token", "by_head",
    "heads", "blocks", "cos_row", "sin_row", "half", "gate_row", "up_row", "dh_row", "dgate_row", "dup_row", "f",
    "chunks", "row_stride", "vocabulary", "x_row", "y_row", "z_row", "dy_row", "dz_row", "n", "block", "count",
}  # fmt: skip


def ptx(name: str, **options: object) -> str:
    """A kernel of bf16 values for compute capability 9.0, pointers and numbers multiples of 16, but for those that no
    kernel is compiled for. No GPU is needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from topwork.ops.triton import gain, layer, logprobs, residual

    kernel = next(getattr(module, name) for module in (layer, residual, gain, logprobs) if hasattr(module, name))
    chosen = {**OPTIONS, **SUMS}[name] | options
    types = {key: "constexpr" if key in chosen else "*bf16" for key in kernel.arg_names}
    types |= {key: "*fp32" for key in FP32 if key in types} | {key: "*i64" for key in LONG if key in types}
    types |= {"x": "*fp32"} if name == "_add_and_round" else {}
    types |= {key: "i32" for key in NUMBERS if key in types}
    types |= {key: "fp32" for key in ("eps", "scale", "multiplier", "by") if key in types}
    types |= {key: "i64" for key in ("key", "least") if key in types}
    sixteens = {
        (at,): [["tt.divisibility", 16]]
        for at, key in enumerate(kernel.arg_names)
        if types[key][0] in "*i" and not kernel.params[at].do_not_specialize
    }
    values = 1
    for key in ("ROWS", "WIDTH", "HEADS", "HALF", "COLUMNS", "VALUES"):
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


@pytest.mark.parametrize("name", SUMS)
def test_sums_over_rows_read_memory_in_large_pieces(triton_cache, name: str) -> None:
    made = ptx(name)
    assert "ld.global.v4.b32" in made
    assert not re.search(r"\.global\.(v2\.)?b(8|16)\b", made)
    assert "atom" not in made


@pytest.mark.parametrize("name", ["_rms_norm", "_rotate", "_add_and_round", "_multiply", "_gain_sums"])
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


@pytest.fixture
def recorded(triton, monkeypatch) -> Callable[[], dict[str, dict[str, object]]]:
    """What each kernel was given so far; no kernel runs."""
    from topwork.ops.triton import gain, layer, logprobs, residual

    recorders = {module.__name__.rpartition(".")[2]: Recorder(module) for module in (gain, layer, logprobs, residual)}
    monkeypatch.setattr(load, "kernels", lambda name, _: recorders[name])
    monkeypatch.setattr(native, "compiled", lambda _: None)
    return lambda: {name: values for recorder in recorders.values() for name, values in recorder.given.items()}


def assert_given(found: dict[str, dict[str, object]], expected: dict[str, dict[str, object]]) -> None:
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert {key: id(value) for key, value in found[name].items()} == {
            key: id(value) for key, value in values.items()
        }


def test_the_kernels_are_given_what_they_take(recorded) -> None:
    x, weight, cos, sin = (torch.randn(shape) for shape in [(6, 4, 8), 8, (6, 8), (6, 8)])
    dy, rstd = torch.randn(6, 4, 8), torch.ones(24)
    dh, gate, up = (torch.randn(6, 8) for _ in range(3))
    dgate, dup, targets, gradient = torch.randn(6, 8), torch.randn(6, 8), torch.arange(6), torch.ones(6)
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
    assert_given(recorded(), expected)


def test_so_are_those_of_what_adapters_learn_and_of_the_sum(recorded) -> None:
    z, dy = torch.randn(6, 8), torch.randn(6, 8)
    x, total, narrow, rounded = torch.randn(1, 6, 8), torch.empty(1, 6, 8), dy.bfloat16(), z.half()
    factor, beside, times, by = torch.ones(8), torch.ones(8), 0.5, 0.25
    drops = dropout.Dropout(0.5, 12345, torch.arange(6))
    gain.multiply_(z, factor, beside)
    gain.add_(z, factor)
    assert gain.column_sums(dy) == "column_sums"
    residual.add_and_round(x, narrow, times, total, rounded, by)
    dropout.drop(dy, drops, z, add=True)
    expected = {
        "multiply_": {"z": z, "factor": factor, "left_alone": beside},
        "add_": {"z": z, "amount": factor},
        "column_sums": {"dy": dy},
        "add_and_round": {
            "x": x, "y": narrow, "multiplier": times, "total": total, "rounded": rounded, "by": by
        },
    }  # fmt: skip
    found = recorded()
    drop = found.pop("drop")
    assert (drop["x"], drop["out"], drop["draws"], drop["add"]) == (dy, z, drops.seeds, True)
    assert (drop["key"], drop["least"], drop["scale"]) == (drops.key, drops.least, drops.scale)
    assert_given(found, expected)
    sums = {"factor": factor, "dy": dy}
    assert gain.gain_gradients_(z, dy, factor, beside) == "gain_sums_"
    assert_given({"gain_sums_": recorded()["gain_sums_"]},
                 {"gain_sums_": sums | {"y": z, "left_alone": beside, "dz": z, "divides": True}})  # fmt: skip
    assert gain.input_gain_gradients_(z, dy, factor) == "gain_sums_"
    assert_given({"gain_sums_": recorded()["gain_sums_"]},
                 {"gain_sums_": sums | {"y": z, "left_alone": None, "dz": dy, "divides": False}})  # fmt: skip


@pytest.mark.parametrize("y", [torch.randn(6, 16)[:, :8].bfloat16()[:, ::2], torch.randn(6, 4).double()])
def test_what_a_sum_cannot_be_given_goes_to_the_truth(recorded, y) -> None:
    x, rounded = torch.randn(1, 6, 4), torch.empty(6, 8, dtype=torch.bfloat16)[:, ::2]
    residual.add_and_round(x, y, 1.0, x, rounded)
    assert recorded() == {}


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_the_kernels_are_the_truth(triton, wrong_on_gpu, family: str) -> None:
    assert wrong_on_gpu(CASES, family) == (FAMILIES[family], [])


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", load.FLOATS)
def test_on_a_gpu_every_function_goes_to_its_kernel(triton, monkeypatch, dtype: torch.dtype) -> None:
    """With the truths out of the way, and without waiting for the GPU."""
    made = {"device": "cuda", "dtype": dtype}
    x, weight, table = torch.randn(6, 4, 64, **made), torch.randn(64, **made), torch.rand(6, 64, device="cuda")
    gate, targets, ones = torch.randn(6, 64, **made), torch.arange(6, device="cuda"), torch.ones(6, device="cuda")
    stream, factor = torch.randn(1, 6, 64, device="cuda"), torch.ones(64, device="cuda")
    drops = dropout.Dropout(0.5, 12345, targets)
    for module in (norm, rotary, gated, gain, residual, dropout):
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
        gain.multiply_(gate, factor, weight)
        gain.gain_gradients_(gate, gate.clone(), factor, weight)
        gain.input_gain_gradients_(gate, gate.clone(), factor)
        gain.add_(gate, factor)
        gain.column_sums(gate)
        residual.add_and_round(stream, gate, 0.5, stream, gate.clone())
        dropout.drop(gate, drops, gate.clone())
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


@pytest.mark.gpu
@GPU
def test_on_a_gpu_a_stream_passes_two_to_the_thirty_first(triton) -> None:
    """The last row of a sum, of a gain and of a shift whose values lie beyond it."""
    tokens, d = 2**18 + 1, 8192
    x = torch.zeros(1, tokens, d, device="cuda")
    y = torch.zeros(tokens, d, device="cuda", dtype=torch.bfloat16)
    y[-1].normal_()
    last = y[-1].float()
    residual.add_and_round(x, y, 0.5, x, None)
    torch.testing.assert_close(x[0, -1], 0.5 * last)
    assert not x[0, :-1].any()
    del x
    factor = torch.full((d,), 3.0, device="cuda")
    gain.multiply_(y, factor)
    gain.add_(y, factor)
    torch.testing.assert_close(y[-1], ((last * 3).bfloat16() + 3).bfloat16())
    torch.testing.assert_close(gain.column_sums(y), y.sum(0, dtype=torch.float32), rtol=1e-5, atol=1e-3)
