"""The Triton kernel of grouped products: the truth in the interpreter, sound as compiled, the truth on a GPU."""

import re
from pathlib import Path

import pytest
import torch

from topwork.ops import grouped
from topwork.ops.grouped import Product, grouped_products, staged
from topwork.ops.triton import load

CASES = Path(__file__).with_name("triton_grouped_cases.py")
COUNT = (2 * 4 + 4) * (4 * 8 + 2)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.slow
def test_in_the_interpreter_the_kernel_is_the_truth(triton, interpreted) -> None:
    lines = interpreted(CASES)
    assert len(lines) == COUNT
    assert [line for line in lines if not line.endswith(": as the truth")] == []


def ptx(monkeypatch, tmp_path, **options: object) -> str:
    """The kernel for compute capability 9.0. No GPU is needed."""
    from triton import language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from topwork.ops.triton.grouped_kernels import multiply_grouped

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    chosen: dict[str, object] = {
        "TYPE": tl.bfloat16, "RIGHT_TYPE": tl.bfloat16, "DOT_TYPE": tl.bfloat16, "OUT_TYPE": tl.bfloat16,
        "LEFT_TURNED": False, "RIGHT_TURNED": True, "OUT_TURNED": False, "ADD": True, "CUT": False, "ALIGNED": True,
        "SEARCH": 5, "ROWS": 64, "COLUMNS": 64, "STEPS": 64,
    }  # fmt: skip
    chosen |= options
    kinds = {"table": "*i64", "count": "i32"}
    types = {key: kinds.get(key, "constexpr") for key in multiply_grouped.arg_names}
    source = ASTSource(multiply_grouped, types, constexprs=chosen, attrs={(0,): [["tt.divisibility", 16]]})
    return str(compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"])


TURNS = [(False, True, False), (False, False, False), (True, False, True), (True, False, False)]


@pytest.mark.parametrize("masters", [False, True], ids=["one type", "fp32 masters"])
@pytest.mark.parametrize("turned", TURNS, ids=str)
def test_the_compiled_kernel_uses_tensor_cores_and_moves_16_bytes_at_a_time(
    triton, monkeypatch, tmp_path, turned: tuple[bool, bool, bool], masters: bool
) -> None:
    """Through shared memory, several steps ahead. A hint that the compiler loses costs a load for every value."""
    from triton import language as tl

    left, right, out = turned
    of = {"RIGHT_TYPE": tl.float32} if masters else {}
    for cut in (False, True):
        also = {"CUT": True, "ADD": False, "OUT_TYPE": tl.float32} if cut else {}
        made = ptx(
            monkeypatch, tmp_path, LEFT_TURNED=left, RIGHT_TURNED=right, OUT_TURNED=out and not cut, **of, **also
        )
        assert re.search(r"wgmma\S*\.f32\.bf16", made)
        assert "cp.async.cg.shared.global" in made
        assert "st.global.v4.b32" in made
        assert not re.search(r"(ld|st)\.global\.b(8|16|32)\b", made)
        assert ".local" not in made


def test_fp32_is_not_multiplied_as_tf32(triton, monkeypatch, tmp_path) -> None:
    from triton import language as tl

    made = ptx(monkeypatch, tmp_path, TYPE=tl.float32, RIGHT_TYPE=tl.float32, DOT_TYPE=tl.float32, OUT_TYPE=tl.float32)
    assert "tf32" not in made
    assert "fma.rn.f32" in made


def test_pieces_hold_all_rows_and_are_few(triton) -> None:
    from topwork.ops.triton.grouped import PIECE, PIECES, pieces_of

    for k in (0, 1, 1024, 1025, 8192, 8193, 100_000):
        count, length = pieces_of(k)
        assert count * length >= k > (count - 1) * length or (k, count) == (0, 0)
        assert count <= PIECES
        assert length >= PIECE
        assert length % 64 == 0


def test_products_on_a_gpu_go_to_the_kernel(triton, monkeypatch) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.told: list[object] = []

        def staged(self, stages: list[list[Product]]) -> list[object]:
            self.told.append(stages)
            return [lambda: self.told.append("called") for _ in stages]

    recorder = Recorder()
    monkeypatch.setattr(grouped, "_native_runs", lambda _: False)
    monkeypatch.setattr(load, "kernels", lambda name, _: recorder if name == "grouped" else None)
    products = [Product(torch.randn(3, 4), torch.randn(4, 5), torch.empty(3, 5))]
    grouped_products(products)
    assert recorder.told == [[products], "called"]
    for stage in staged([products, products]):
        stage()
    assert recorder.told[2:] == [[products, products], "called", "called"]
    expanded = Product(torch.randn(1, 1).expand(3, 4), torch.randn(4, 5), torch.empty(3, 5))
    assert len(staged([products, [expanded]])) == 2  # what has no contiguous axis is copied when it is there
    assert len(recorder.told) == 5


def test_a_stage_reads_what_the_one_before_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right, last = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5, 2)
    middle, out = torch.empty(3, 5), torch.ones(3, 2)
    for stage in staged([[Product(left, right, middle)], [], [Product(middle, last, out, 1.0, 1)]]):
        stage()
    torch.testing.assert_close(out, left @ right @ last + 1)


@pytest.mark.gpu
@GPU
def test_on_a_gpu_the_kernel_is_the_truth(triton, wrong_on_gpu) -> None:
    assert wrong_on_gpu(CASES) == (COUNT, [])
