"""Row lengths of W + s B A: the truth against the sum itself, the Triton kernel against the truth."""

import re
from pathlib import Path

import pytest
import torch

from reference.measure import relative
from topwork.ops import row_lengths as module
from topwork.ops.row_lengths import row_lengths, row_lengths_reference
from topwork.ops.triton import load

CASES = Path(__file__).with_name("triton_row_lengths_cases.py")
COUNT = 3 * 7 * 2 + 1


def given(outputs: int = 12, r: int = 3, inputs: int = 20) -> tuple[torch.Tensor, ...]:
    w, a, b = torch.randn(outputs, inputs), torch.randn(r, inputs), torch.randn(outputs, r)
    return w, a, b


def test_the_truth_is_the_length_of_the_sum() -> None:
    w, a, b = given()
    found = row_lengths(w.square().sum(1), b, w @ a.t(), a @ a.t(), 0.3)
    assert relative(found, (w.double() + 0.3 * b.double() @ a.double()).norm(dim=1)) < 1e-6


def test_what_does_not_fit_is_refused() -> None:
    w, a, b = given()
    right = [w.square().sum(1), b, w @ a.t(), a @ a.t()]
    for at, wrong in [(0, torch.ones(11)), (2, torch.ones(12, 4)), (3, torch.ones(2, 3))]:
        with pytest.raises(ValueError, match="do not belong"):
            row_lengths(*[wrong if number == at else x for number, x in enumerate(right)], 1.0)


def test_on_a_gpu_the_kernel_is_asked(triton, monkeypatch: pytest.MonkeyPatch) -> None:
    w, a, b = given()
    right = [w.square().sum(1), b, w @ a.t(), a @ a.t()]

    class Recorder:
        row_lengths = staticmethod(lambda *values: values)

    monkeypatch.setattr(load, "kernels", lambda name, _: Recorder if name == "row_lengths" else None)
    assert [x is y for x, y in zip(row_lengths(*right, 2.0), right)] == [True] * 4
    other = row_lengths(right[0].double(), *right[1:], 2.0)  # which the kernel does not know
    assert torch.equal(other, row_lengths_reference(right[0].double(), *right[1:], 2.0))
    assert module.triton is load


def test_in_the_interpreter_the_kernel_is_the_truth(triton, interpreted) -> None:
    lines = interpreted(CASES)
    assert len(lines) == COUNT
    assert [line for line in lines if not line.endswith(": as the truth")] == []


@pytest.mark.parametrize("r", [16, 64, 256])
def test_the_compiled_kernel_multiplies_in_fp32(triton, monkeypatch, tmp_path, r: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from topwork.ops.triton.row_lengths import ROWS, WIDEST, _row_lengths

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"squares": "*fp32", "b": "*fp32", "across": "*bf16", "gram": "*fp32", "lengths": "*fp32"}
    numbers = {"across_row": "i32", "across_column": "i32", "outputs": "i32", "scaling": "fp32"}
    chosen = {"R": r, "ROWS": ROWS, "COLUMNS": min(WIDEST, r)}
    types = {name: {**pointers, **numbers}.get(name, "constexpr") for name in _row_lengths.arg_names}
    sixteens = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(_row_lengths.arg_names) if name in pointers}
    source = ASTSource(_row_lengths, types, constexprs=chosen, attrs=sixteens)
    made = str(compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"])
    assert "tf32" not in made
    assert "sqrt.rn.f32" in made
    assert re.search(r"(cp\.async\.cg|ld\.global\.v4)", made)
    assert ".local" not in made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_kernel_is_the_truth(triton, wrong_on_gpu) -> None:
    assert wrong_on_gpu(CASES) == (COUNT, [])
