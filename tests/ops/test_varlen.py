"""Which kernel attends on a GPU, and the calls of those that others wrote."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from types import ModuleType

import pytest
import torch
from torch import Tensor

from reference.attention import attention_by_sequence
from reference.measure import relative
from topwork.ops import attention, varlen
from topwork.ops.attention import attention_backward, attention_forward, attention_kernel, flat_attention
from topwork.ops.attention_reference import AttentionRule, backward_reference, forward_reference
from topwork.ops.triton import load
from topwork.ops.varlen import BY_HAND, Inputs, Kernel

RAGGED = (0, 7, 8, 27, 31, 50, 68, 69)
PLAIN = AttentionRule(0.125)
FLASH, TORCH, OURS = varlen.KERNELS


def batch(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(69, n, 64).to(dtype) for n in (4, 2, 2))
    return query, key, value


class OnGpu:
    """What the choice asks of a tensor."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = shape, dtype

    def __len__(self) -> int:
        return self.shape[0]


def asked(
    tokens: int = 69, heads: int = 4, size: int = 64, size_v: int | None = None, dtype: torch.dtype = torch.bfloat16,
    rule: AttentionRule = PLAIN, sinks: bool = False, sequences: int = 7,
) -> Inputs:  # fmt: skip
    shapes = (tokens, heads, size), (tokens, 2, size), (tokens, 2, size_v or size)
    bounds = (*range(sequences), tokens)
    given = [OnGpu(*shape, dtype=dtype) for shape in shapes]
    return Inputs(*given, bounds, rule, OnGpu(heads) if sinks else None)  # type: ignore[arg-type]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, triton: ModuleType) -> Iterator[None]:
    """A card, no flash-attn, and no choice by hand."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(varlen, "_flash_attn", lambda: None)
    monkeypatch.delenv(BY_HAND, raising=False)
    varlen._capability.cache_clear()
    yield
    varlen._capability.cache_clear()


CHOICES = {
    "plain": (asked(), "torch"),
    "fp16": (asked(dtype=torch.float16), "torch"),
    "window": (asked(rule=AttentionRule(0.1, window=5)), "torch"),
    "fp32": (asked(dtype=torch.float32), "triton"),
    "fp64": (asked(dtype=torch.float64), None),
    "soft-capping": (asked(rule=AttentionRule(0.1, softcap=50.0)), "triton"),
    "sinks": (asked(sinks=True), "triton"),
    "heads of 60": (asked(size=60), "triton"),
    "heads of 256": (asked(size=256), "torch"),
    "heads of 264": (asked(size=264), None),
    "values of another size": (asked(size_v=32), "triton"),
    "a negative scale": (asked(rule=AttentionRule(-0.1)), "triton"),
    "no tokens": (asked(tokens=0, sequences=0), None),
    # (T + 128 sequences) * heads * size, which passes 2^31 at 2^19 rows of 32 heads of 128 values
    "just below 2^31": (asked(tokens=2**19 - 128 * 7 - 1, heads=32, size=128), "torch"),
    "2^31": (asked(tokens=2**19 - 128 * 7, heads=32, size=128), "triton"),
    "2^31 with a head rounded up": (asked(tokens=2**19 - 128 * 7, heads=32, size=104), "triton"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_best_that_can(hopper: None, name: str) -> None:
    inputs, expected = CHOICES[name]
    found = varlen.chosen(inputs)
    assert (found and found.name) == expected


def test_older_cards_take_ours(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert varlen.chosen(asked()) is OURS


def test_by_hand(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in (TORCH, OURS):
        monkeypatch.setenv(BY_HAND, kernel.name)
        assert varlen.chosen(asked()) is kernel
    monkeypatch.setenv(BY_HAND, "torch")
    with pytest.raises(ValueError, match=r"is 'torch', which .* run on: it knows no sinks; unset"):
        varlen.chosen(asked(sinks=True))
    monkeypatch.setenv(BY_HAND, "flash-attn")
    with pytest.raises(ValueError, match=r"is 'flash-attn', .*2\.7 or newer, is not installed"):
        varlen.chosen(asked())
    monkeypatch.setenv(BY_HAND, "cudnn")
    with pytest.raises(ValueError, match="is 'cudnn', where one of flash-attn, torch, triton is expected"):
        varlen.chosen(asked())


def test_a_cpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BY_HAND, "triton")
    query, key, value = batch(torch.float16)
    assert attention_kernel(query, key, value, RAGGED, PLAIN) == "plain torch"
    monkeypatch.setattr(attention, "_native", lambda *_: object())
    assert attention_kernel(query, key, value, RAGGED, PLAIN) == "C"


class Package(ModuleType):
    """Stands for flash_attn.flash_attn_interface: signatures as in 2.8.3, arithmetic by the truth."""

    given: dict[str, object]

    def _flash_attn_varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1,
        window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
        return_softmax: bool = False, block_table: Tensor | None = None, leftpad_k: Tensor | None = None,
        seqused_k: Tensor | None = None, zero_tensors: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        self.given = {"longest": (max_seqlen_q, max_seqlen_k), "dropout": dropout_p, "causal": causal}
        bounds, rule = self._read(
            cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size_left, window_size_right, softcap
        )
        return forward_reference(q, k, v, bounds, rule), torch.zeros(q.shape[1], len(q)), q.new_empty(0), q.new_empty(2)

    def _flash_attn_varlen_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
        dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
        window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
        rng_state: Tensor | None = None, zero_tensors: bool = False,
    ) -> Tensor:  # fmt: skip
        self.given = {"longest": (max_seqlen_q, max_seqlen_k), "dropout": dropout_p, "causal": causal}
        self.given |= {"deterministic": deterministic, "lse": softmax_lse.shape}
        assert alibi_slopes is None
        targets = [x for x in (dq, dk, dv) if x is not None]
        assert len(targets) == 3
        for x in targets:
            assert x.dtype == q.dtype
            assert x.stride(-1) == 1
            x.fill_(torch.nan)  # what reads an input after this reads nothing
        bounds, rule = self._read(
            cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size_left, window_size_right, softcap
        )
        backward_reference(dout, q, k, v, out, bounds, rule, None, targets)
        return torch.empty(q.shape[1], len(q) + 128 * len(bounds))

    @staticmethod
    def _read(
        starts: Tensor, other: Tensor, scale: float, left: int, right: int, cap: float
    ) -> tuple[tuple[int, ...], AttentionRule]:
        assert starts.dtype == torch.int32
        assert torch.equal(starts, other)
        assert right == 0
        return tuple(starts.tolist()), AttentionRule(scale, left + 1 if left >= 0 else None, cap or None)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    module, parent = Package("flash_attn.flash_attn_interface"), ModuleType("flash_attn")
    parent.__version__ = "2.8.3"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", parent)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
    varlen._flash_attn.cache_clear()
    yield module
    varlen._flash_attn.cache_clear()


def by(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_native", lambda *_: None)
    monkeypatch.setattr(attention, "chosen", lambda _: kernel)


def views(buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = buffer.unflatten(1, (-1, 64)).split((4, 2, 2), 1)
    return q, k, v


@pytest.mark.parametrize("into", ["none", "buffer", "inputs", "turned"])
@pytest.mark.parametrize("rule", [PLAIN, AttentionRule(0.3, window=5), AttentionRule(0.3, softcap=1.5)], ids=str)
def test_flash_attn_is_called_as_its_signature_says(
    package: Package, monkeypatch: pytest.MonkeyPatch, rule: AttentionRule, into: str
) -> None:
    by(FLASH, monkeypatch)
    buffer, grad = torch.randn(69, 8 * 64).bfloat16(), torch.randn(69, 4, 64).bfloat16()
    inputs = views(buffer)
    leaves = [x.double().requires_grad_() for x in inputs]
    truth = attention_by_sequence(*leaves, RAGGED, **asdict(rule))
    expected = torch.autograd.grad((truth * grad.double()).sum(), leaves)
    out, lse = attention_forward(*inputs, RAGGED, rule)
    causal = rule.window is None
    assert package.given == {"longest": (19, 19), "dropout": 0.0, "causal": causal}
    targets = {
        "none": None, "buffer": views(torch.empty_like(buffer)), "inputs": inputs,
        "turned": tuple(torch.empty(x.shape[::-1]).transpose(0, 2) for x in inputs),
    }[into]  # fmt: skip
    *found, _ = attention_backward(grad, *inputs, out, lse, RAGGED, rule, into=targets)
    assert package.given.pop("deterministic") is True
    assert package.given == {"longest": (19, 19), "dropout": 0.0, "causal": causal, "lse": (4, 69)}
    if targets is not None:
        assert all(x is y for x, y in zip(found, targets))
    assert relative(out, truth) < 3 * 2**-8
    for ours, theirs in zip(found, expected):
        assert relative(ours, theirs) < 3 * 2**-8


@pytest.mark.parametrize(
    ("version", "usable"), [("2.6.3", False), ("2.7.4.post1", True), ("3.0.0", False), ("?", False)]
)
def test_flash_attn_of_other_versions_is_not_called(package: Package, version: str, usable: bool) -> None:
    sys.modules["flash_attn"].__version__ = version  # type: ignore[attr-defined]
    assert (varlen._flash_attn() is package) == usable


def test_flash_attn_that_does_not_load_is_none(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)  # as one made for another torch
    assert varlen._flash_attn() is None


def test_flash_attn_comes_first_where_it_can(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_flash_attn", lambda: object())
    assert varlen.chosen(asked()) is FLASH
    assert varlen.chosen(asked(rule=AttentionRule(0.1, softcap=50.0))) is FLASH
    assert varlen.chosen(asked(sinks=True)) is OURS


def test_layers_on_a_gpu_share_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes alone, on the meta device: the one call of PyTorch's kernels, and bounds that are uploaded once a pass."""
    by(TORCH, monkeypatch)
    varlen._ends.cache_clear()
    for window in (None, 5):
        query, key, value = (x.to("meta").requires_grad_() for x in batch())
        out = flat_attention(query, key, value, RAGGED, AttentionRule(0.125, window))
        assert type(out.grad_fn).__name__ == "_FlatAttentionBackward"
        assert out.shape == query.shape
        for x, slope in zip((query, key, value), torch.autograd.grad(out.sum(), (query, key, value))):
            assert (slope.shape, slope.dtype) == (x.shape, x.dtype)
    assert varlen._ends.cache_info().misses == 1
    assert varlen._ends.cache_info().hits == 3


@pytest.mark.parametrize("mode", ["default", "warn", "error"])
@pytest.mark.parametrize("fills", [True, False])
def test_torch_adds_up_in_one_order_and_flags_are_as_they_were(
    monkeypatch: pytest.MonkeyPatch, mode: str, fills: bool
) -> None:
    """What aten reads while it runs, and what the caller finds after it, also after an error."""
    memory, seen = torch.utils.deterministic, []
    before = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    inputs = Inputs(*(x.to("meta") for x in batch()), RAGGED, PLAIN, None)
    out, lse = TORCH.forward(inputs)
    into = tuple(torch.empty_like(x) for x in inputs.tensors)

    def noted(*args: object, **options: object) -> None:
        seen.append((torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", noted)
    try:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fills
        own = torch.get_deterministic_debug_mode(), fills
        with pytest.raises(RuntimeError, match="out of memory"):
            TORCH.backward(inputs, torch.empty_like(out), out, lse, into)
        assert seen == [(2, False)]
        assert (torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory) == own
    finally:
        torch.set_deterministic_debug_mode(before[0])
        memory.fill_uninitialized_memory = before[1]


def test_ours_is_given_what_it_takes(triton: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from inspect import signature

    from topwork.ops.triton import attention as module

    given = []

    class Recorder:
        @staticmethod
        def attention(*values: object) -> tuple[Tensor, Tensor]:
            given.append(signature(module.attention).bind(*values).arguments)
            return out, lse

        @staticmethod
        def attention_backward(*values: object) -> Tensor:
            given.append(signature(module.attention_backward).bind(*values).arguments)
            return sinks

    by(OURS, monkeypatch)
    monkeypatch.setattr(load, "kernels", lambda name, _: Recorder if name == "attention" else None)
    (query, key, value), sinks = batch(), torch.randn(4)
    out, lse, grad = torch.randn(69, 4, 64), torch.randn(4, 69), torch.randn(69, 4, 64)
    same = {"query": query, "key": key, "value": value, "bounds": RAGGED, "rule": PLAIN, "sinks": sinks}
    assert attention_forward(query, key, value, RAGGED, PLAIN, sinks) == (out, lse)
    found = attention_backward(grad, query, key, value, out, lse, RAGGED, PLAIN, sinks, into=(query, key, value))
    assert found == (query, key, value, sinks)
    assert [{name: id(x) for name, x in values.items() if name != "into"} for values in given] == [
        {name: id(x) for name, x in expected.items()}
        for expected in (same, same | {"grad": grad, "out": out, "lse": lse})
    ]
    assert given[1]["into"] == (query, key, value)
