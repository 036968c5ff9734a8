"""A pass's own memory: steps are what they are without it, whatever of it is overwritten as soon as it may be."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.compiler import NATIVE
from reference.families import MIXED, added, learning_batch, sequences, tiny_base
from reference.quantized_by_others import write_base
from topwork.adapters import base_weight
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.models.base import Base
from topwork.models.checkpointing import checkpoint_layers
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.objectives.sft import Sft
from topwork.ops import quantized_linear, workspace
from topwork.ops.batch import Batch, Segment
from topwork.ops.context import handback_empty, handoff_empty, saved_empty, scratch_empty, scratch_scope, training_pass
from topwork.ops.native import load
from topwork.ops.packed import pack_4bit, pack_int8
from topwork.ops.residual import residual_branch, residual_sum
from topwork.ops.workspace import Workspace
from topwork.quantization.config import QuantizationConfig
from topwork.quantization.linear import packed_modules
from topwork.training.step import Learner, StepResult, train_step

pytestmark = pytest.mark.slow

LENGTHS = [(13, 5, 7), (3, 1, 4), (24, 30, 11), (9, 2, 2)]
"""Of the rows of each pass: shorter and longer than the one before."""
OTHER = AdapterConfig(r=3, target_modules=["q_proj", "v_proj"])
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "ia3": {"method": "ia3"},
    "full": {"method": "full"},
    "prefix": {"method": "prefix", "num_virtual_tokens": 3},
    "prompt": {"method": "prompt", "num_virtual_tokens": 3},
    "a saved MLP": {"modules_to_save": ["mlp"]},
    "a saved projection": {"modules_to_save": ["o_proj"]},
}
LAYERS = 4
"""The last one sums only the rows that are wanted, and the first is given a copy: what is overwritten lies between."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {"layer_types": 2 * MIXED}, "gemma2": {"layer_types": 2 * MIXED},
    "gemma3_text": {"layer_types": 2 * MIXED}, "olmo2": {}, "phi3": {}, "granite": {"residual_multiplier": 0.22},
    "mixtral": {}, "gpt2": {"n_layer": LAYERS}, "opt": {},
}  # fmt: skip


class Poisoned(Workspace):
    """Everything that may be overwritten is not a number at once."""

    def begin_pass(self) -> None:
        for block in (*self._saved, *self._scratch, *self._handoff, *self._handback):
            block.fill_(255)
        super().begin_pass()

    @contextmanager
    def scope(self) -> Iterator[None]:
        before = self._scratch_end
        with super().scope():
            yield
        for block in self._scratch:
            block[before:].fill_(255)

    def handoff(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        for block in self._handoff:
            block.fill_(255)
        return super().handoff(shape, dtype)

    def handback(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        for block in self._handback:
            block.fill_(255)
        return super().handback(shape, dtype)


class Sized(Workspace):
    """Knows how much the largest pass kept."""

    most = total = 0

    def begin_pass(self) -> None:
        self.total = 0
        super().begin_pass()

    def saved(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        found = super().saved(shape, dtype)
        self.total += found.nbytes
        self.most = max(self.most, self.total)
        return found


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that several are needed, some of them joined in the next pass."""
    monkeypatch.setattr(workspace, "LEAST_BLOCK", 1 << 14)


def passes() -> list[Batch]:
    """Each with a segment of both adapters."""
    made = []
    for seed, lengths in enumerate(LENGTHS):
        batch = learning_batch(sequences(lengths, seed), "a", seed)
        middle, end = batch.cu_seqlens[2], batch.cu_seqlens[-1]
        made.append(replace(batch, segments=(Segment(0, middle, "a"), Segment(middle, end, "b"))))
    return made


def stepped(
    memory: Workspace | None, options: dict[str, Any], dtype: torch.dtype | str, family: str = "llama", layers: int = 0,
    other: AdapterConfig | None = None, packed: tuple[Path, QuantizationConfig] | None = None,
) -> tuple[Base, Adapters, list[StepResult]]:  # fmt: skip
    """Three steps of two adapters; over the base in that folder, packed, where one is given."""
    if packed is None:
        base = tiny_base(family, dtype, num_hidden_layers=LAYERS, **FAMILIES[family])
    else:
        config = ModelConfig.model_validate({"model_name_or_path": str(packed[0]), "dtype": dtype, "device": "cpu"})
        base = load_base(config, lambda _: None, packed[1])
        assert packed_modules(base.module)
    base = replace(base, workspace=memory)
    other = other or (OTHER if family == "llama" else AdapterConfig(r=3))
    adapters = added(base, a=AdapterConfig.model_validate(options), b=other)
    checkpoint_layers(base, layers)
    learners = []
    for name in ("a", "b"):
        parameters = list(adapters.parameters(name).values())
        learners.append(Learner(name, Sft(), parameters, torch.optim.SGD(parameters, lr=0.1), 1.0))
        adapters.train(name)
    results = [result for _ in range(3) for result in train_step(base, learners, passes())]
    assert all(isinstance(result, StepResult) for result in results)
    return base, adapters, results  # type: ignore[return-value]


def assert_same(*given: Any, **more: Any) -> Base:
    _, without, expected = stepped(None, *given, **more)
    base, adapters, found = stepped(Poisoned(), *given, **more)
    assert found == expected
    for name in ("a", "b"):
        pairs = zip(adapters.parameters(name).items(), without.parameters(name).values(), strict=True)
        for (path, one), other in pairs:
            assert torch.equal(one, other), path
    return base


def keeps(options: dict[str, Any], dtype: torch.dtype) -> bool:
    """Weights that learn themselves run as plain modules: in fp32 only a C kernel of theirs keeps something there."""
    return NATIVE or options != METHODS["full"] or dtype != torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_a_step_is_what_it_is_without(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert assert_same(options, dtype).workspace._saved or not keeps(options, dtype)


@pytest.mark.parametrize("method", ["lora", "dropout", "dora", "ia3", "prefix"])
@pytest.mark.parametrize("options", [{"load_in_4bit": True, "head": "int8"}, {"load_in_8bit": True}], ids=["4", "8"])
def test_over_a_packed_base(
    method: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some weights are several panels, each overwritten as soon as it was multiplied."""
    monkeypatch.setitem(quantized_linear.PANEL_BYTES, "cpu", 1 << 12)
    monkeypatch.setitem(base_weight.PANEL_VALUES, "cpu", 1 << 11)
    packed = write_base(tmp_path / "base", "llama", num_hidden_layers=LAYERS), QuantizationConfig(**options)
    for dtype in ("float32", "bfloat16"):
        for layers in (0, 2):
            assert assert_same(METHODS[method], dtype, "llama", layers, packed=packed).workspace._saved


def test_a_panel_is_brief() -> None:
    if load.compiled("quantize4") is None:
        pytest.skip("no C compiler")
    memory = Workspace()
    for packed in (pack_4bit(torch.randn(64, 64), "nf4", 64, True), pack_int8(torch.randn(64, 64))):
        with training_pass(memory):
            outside = packed.dense()
            with scratch_scope():
                inside = packed.dense()
                assert inside.data_ptr() == memory._scratch[0].data_ptr() != outside.data_ptr()
                assert torch.equal(inside, outside)


@pytest.mark.parametrize("layers", range(1, LAYERS + 1))
@pytest.mark.parametrize("method", ["lora", "dropout", "dora", "prefix", "full"])
def test_a_checkpointed_layer_keeps_nothing_there(method: str, layers: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = assert_same(METHODS[method], dtype, "llama", layers)
        assert bool(base.workspace._saved) == (layers < LAYERS and keeps(METHODS[method], dtype))


def test_nor_does_one_that_no_gradient_reaches() -> None:
    def kept_bytes(layers: list[int]) -> int:
        options = {"layers_to_transform": layers}
        assert_same(options, torch.bfloat16)
        base, _, _ = stepped(Sized(), options, torch.bfloat16, other=AdapterConfig.model_validate({**options, "r": 3}))
        assert isinstance(base.workspace, Sized)
        return base.workspace.most

    assert kept_bytes([3]) < 0.3 * kept_bytes([0])


@pytest.mark.parametrize("family", FAMILIES)
def test_in_all_kinds_of_families(family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_same({}, dtype, family)


def test_it_does_not_grow_once_it_has_seen_the_largest_pass() -> None:
    base, _, _ = stepped(Sized(), {}, torch.bfloat16)
    own = base.workspace
    assert isinstance(own, Sized)
    assert [len(blocks) for blocks in (own._scratch, own._handoff, own._handback)] == [1, 1, 1]
    assert own.most <= sum(map(len, own._saved)) < 1.5 * own.most
    before = [block.data_ptr() for block in own._saved]
    learner_less: list[Learner] = []
    train_step(base, learner_less, [])
    assert [block.data_ptr() for block in own._saved] == before
    own.release()
    assert not own._saved


def taken(memory: Workspace, *sizes: int) -> list[int]:
    """Addresses of what a pass keeps."""
    memory.begin_pass()
    return [memory.saved((size,), torch.uint8).data_ptr() for size in sizes]


def test_a_longer_pass_leaves_the_blocks_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "LEAST_BLOCK", 1024)
    memory = Workspace()
    short = taken(memory, 512, 448)
    long = taken(memory, 512, 448, 640, 320)
    assert long[:2] == short
    assert long[3] - long[2] == 640
    assert [len(block) for block in memory._saved] == [1024, 1024]
    assert taken(memory, 512, 448, 640, 320) == long
    assert taken(memory, 512) == long[:1]


def test_blocks_that_would_stay_half_empty_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "LEAST_BLOCK", 1024)
    memory = Workspace()
    taken(memory, 576, 640, 2048, 64)
    assert [len(block) for block in memory._saved] == [1024, 1024, 2048, 1024]
    first = taken(memory, 576, 640, 2048, 64)
    assert [len(block) for block in memory._saved] == [3328]
    assert first[3] - first[0] == 576 + 640 + 2048


def test_kept_tensors_stand_behind_one_another_and_the_next_pass_takes_their_place() -> None:
    memory, like = Workspace(), torch.zeros(1, dtype=torch.bfloat16)
    with training_pass(memory):
        first, second = saved_empty(like, 5, 7), saved_empty(like, 3, dtype=torch.float32)
        assert second.data_ptr() - first.data_ptr() == 128
        assert (first.dtype, second.dtype) == (torch.bfloat16, torch.float32)
        version = second._version
        first.zero_()
        assert second._version == version  # autograd would take the write for one to it
    with training_pass(memory):
        assert saved_empty(like, 2).data_ptr() == first.data_ptr()
    assert saved_empty(like, 2).data_ptr() != first.data_ptr()


def test_a_pass_inside_another_is_refused() -> None:
    memory = Workspace()
    with training_pass(memory), pytest.raises(AssertionError, match="a pass inside another"), training_pass(memory):
        pass


def test_what_is_brief_ends_with_its_function_and_what_passes_with_the_next() -> None:
    memory, like = Workspace(), torch.zeros(1)
    with training_pass(memory):
        alone = scratch_empty(like, 8)
        with scratch_scope():
            outer = scratch_empty(like, 16)
            with scratch_scope():
                inner = scratch_empty(like, 16)
            again = scratch_empty(like, 16)
        assert inner.data_ptr() == again.data_ptr() == outer.data_ptr() + 64
        assert (
            not memory._scratch[0].data_ptr()
            <= alone.data_ptr()
            < memory._scratch[0].data_ptr() + len(memory._scratch[0])
        )
        one, other = handoff_empty(like, 3), handoff_empty(like, 5)
        assert one.data_ptr() == other.data_ptr() != outer.data_ptr()
        back, next_back = handback_empty(like, 3), handback_empty(like, 5)
        assert back.data_ptr() == next_back.data_ptr() != one.data_ptr()
        with scratch_scope():
            held = scratch_empty(like, 4).fill_(2)
            large = scratch_empty(like, 1 << 16).fill_(3)
            assert bool((held == 2).all())
            assert bool((large == 3).all())


@pytest.mark.parametrize("multiplier", [1.0, 0.22])
@pytest.mark.parametrize("width", [3, 1 << 16])
def test_a_residual_stream_is_overwritten_where_it_is_said(width: int, multiplier: float) -> None:
    """Two branches: the values and gradients are autograd's own either way."""
    x, dz = torch.randn(1, 5, width), torch.randn(1, 5, width)
    weights = [torch.randn(width).bfloat16() for _ in range(2)]
    given = x.clone().requires_grad_()
    z = given
    for weight in weights:
        z = z + multiplier * (z.bfloat16() * weight).float()
    z.backward(dz)
    found = []
    for memory in (Workspace(), None):
        leaf = x.clone().requires_grad_()
        with training_pass(memory):
            begun, in_place = leaf * 1, memory is not None
            same, branch = residual_branch(begun, torch.bfloat16, in_place=in_place)
            between, other = residual_branch(same, torch.bfloat16, branch * weights[0], multiplier, in_place)
            end = residual_sum(between, other * weights[1], multiplier, in_place)
            assert (end.data_ptr() == between.data_ptr() == begun.data_ptr()) == in_place
            arrived = dz.clone()
            end.backward(arrived)
            assert torch.equal(arrived, dz) == (not in_place)
        assert torch.allclose(end, z, atol=1e-6, rtol=1e-6)
        assert torch.allclose(leaf.grad, given.grad, atol=0.05, rtol=0.02)  # type: ignore[arg-type]
        found.append((end.detach().clone(), leaf.grad))
    assert all(map(torch.equal, *found))


def test_a_branch_that_nobody_takes_and_a_stream_that_ends() -> None:
    """Where one of the two has no gradient, the other's alone goes on."""
    for memory in (Workspace(), None):
        for taken in (0, 1):
            leaf = torch.randn(1, 5, 3).requires_grad_()
            with training_pass(memory):
                outputs = residual_branch(leaf * 1, torch.bfloat16, in_place=memory is not None)
                outputs[taken].sum().backward()
            assert torch.equal(leaf.grad, torch.ones(1, 5, 3))  # type: ignore[arg-type]


def test_a_stream_that_is_a_view_is_left_alone() -> None:
    """Its branch and gradients are right, and what it is a view of stays as it is."""
    leaf = torch.randn(5, 3).requires_grad_()
    with training_pass(Workspace()):
        begun = leaf * 1
        total, branch = residual_branch(begun[None], torch.bfloat16, torch.ones(5, 3).bfloat16(), in_place=True)
        assert torch.equal(begun, leaf)
        assert torch.equal(branch, (leaf + 1).bfloat16())
        total.sum().backward()
    assert torch.equal(leaf.grad, torch.ones(5, 3))  # type: ignore[arg-type]


def test_one_type_needs_no_copy() -> None:
    x, y = torch.randn(1, 5, 3), torch.randn(5, 3)
    assert torch.equal(residual_sum(x, y, 0.5), x + 0.5 * y)
    total, branch = residual_branch(x, torch.float32)
    assert total is x
    assert torch.equal(branch, x[0])
