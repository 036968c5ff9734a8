"""Causal attention over a flat batch: each sequence attends to itself alone.

On CPUs a C kernel (native/attention.c) runs forward and backward in bf16 and fp32, on GPUs PyTorch's variable-length
FlashAttention in 16 bits; soft-capping, sinks and everything else go to plain torch (attention_reference.py), which is
also the truth. `flat_attention` is the differentiable entry; `attention_forward` and `attention_backward` are the same
without autograd, for callers that write their own backward.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from topwork.ops.attention_reference import AttentionRule, backward_reference, forward_reference
from topwork.ops.context import saved_empty
from topwork.ops.host import sent
from topwork.ops.native import load as native

NATIVE_SIZES = range(16, 257, 16)
"""The head sizes of the C kernel."""


def flat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[int, ...],
    rule: AttentionRule,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of every sequence of a batch with itself.

    query [T, H, D], key and value [T, H_kv, D] with H a multiple of H_kv; bounds S + 1 ints from 0 to T; sinks [H].
    Returns [T, H, D].
    """
    return _FlatAttention.apply(query, key, value, bounds, rule, sinks)


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], rule: AttentionRule, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(out, lse), without autograd. Takes what `flat_attention` takes; inputs may be strided views.

    out [T, H, D] is contiguous; lse is fp32 [H, T], the natural logarithm of each softmax's denominator, or None where
    the backward makes its own.
    """
    _check(query, key, value, bounds)
    if library := _native(query, key, value, rule, sinks):
        return _native_forward(library, query, key, value, bounds, rule)
    if _varlen_runs(query, rule, sinks):
        return _varlen_forward(query, key, value, bounds, rule)
    return forward_reference(query, key, value, bounds, rule, sinks), None


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor | None, bounds: tuple[int, ...],
    rule: AttentionRule, sinks: Tensor | None = None, into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of query, key, value and sinks from `grad` of `out`; `out` and `lse` as `attention_forward` gave them.

    The first three are written into the tensors of `into` where given, which may be strided views and even query, key
    and value themselves, but may not overlap otherwise.
    """
    _check(query, key, value, bounds)
    _check_backward(grad, query, key, value, out, into)
    if lse is not None and into is None and _varlen_runs(query, rule, sinks):
        return *_varlen_backward(grad, query, key, value, out, lse, bounds, rule), None
    targets = into or _empty(query, key, value)
    sink_grad = None
    if lse is not None and (library := _native(query, key, value, rule, sinks)):
        _native_backward(library, grad, (query, key, value), out, lse, bounds, rule, targets)
    elif lse is not None and _varlen_runs(query, rule, sinks):
        for target, result in zip(targets, _varlen_backward(grad, query, key, value, out, lse, bounds, rule)):
            target.copy_(result)
    else:
        sink_grad = backward_reference(grad, query, key, value, out, bounds, rule, sinks, targets)
    return *targets, sink_grad


class _FlatAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bounds, rule, sinks):  # type: ignore[no-untyped-def]
        out, lse = attention_forward(query, key, value, bounds, rule, sinks)
        ctx.save_for_backward(query, key, value, out, lse, sinks)
        ctx.bounds, ctx.rule = bounds, rule
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        query, key, value, out, lse, sinks = ctx.saved_tensors
        *grads, sink_grad = attention_backward(grad, query, key, value, out, lse, ctx.bounds, ctx.rule, sinks)
        return *grads, None, None, sink_grad


def _empty(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _check(query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...]) -> None:
    tokens = query.shape[0]
    if bounds[:1] != (0,) or bounds[-1] != tokens or any(b < a for a, b in zip(bounds, bounds[1:])):
        raise ValueError(f"bounds {bounds} do not cover a batch of {tokens} tokens from 0 on, rising")
    if key.shape[0] != tokens or value.shape[:2] != key.shape[:2] or key.shape[2] != query.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value of {shapes} do not fit: [T, H, D], [T, H_kv, D], [T, H_kv, D]")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads are no multiple of {key.shape[1]} key heads")


def _check_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, into: Sequence[Tensor] | None
) -> None:
    expected = [(*query.shape[:2], value.shape[2])] * 2 + [tuple(x.shape) for x in (query, key, value)]
    found = [tuple(x.shape) for x in (grad, out, *(into or (query, key, value)))]
    if found != expected:
        raise ValueError(f"grad, out and gradients of shapes {found}, where {expected} are expected")


def _native(query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule, sinks: Tensor | None) -> ctypes.CDLL | None:
    """The C kernel, where it knows this case."""
    size = query.shape[-1]
    known = (
        query.device == key.device == value.device
        and query.dtype == key.dtype == value.dtype
        and size in NATIVE_SIZES
        and value.shape[-1] == size
        and rule.softcap is None
        and sinks is None
        and rule.scale > 0
        and (rule.window is None or rule.window > 0)
    )
    return native.kernels("attention", query) if known else None


def _native_forward(
    library: ctypes.CDLL, query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], rule: AttentionRule
) -> tuple[Tensor, Tensor]:
    out = saved_empty(query, *query.shape)
    lse = saved_empty(query, query.shape[1], query.shape[0], dtype=torch.float32)
    inputs = [_by_rows(x, query.dtype) for x in (query, key, value)]
    _call(library.topwork_attention_forward, [*inputs, out], lse, bounds, rule)
    return out, lse


def _native_backward(
    library: ctypes.CDLL, grad: Tensor, inputs: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor,
    bounds: tuple[int, ...], rule: AttentionRule, targets: Sequence[Tensor],
) -> None:  # fmt: skip
    query = inputs[0]
    if lse.shape != (query.shape[1], query.shape[0]) or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(f"lse {tuple(lse.shape)} of {lse.dtype} is not what attention_forward gave")
    written = [x if _plain(x, query.dtype) else torch.empty(x.shape, dtype=query.dtype) for x in targets]
    tensors = [*(_by_rows(x, query.dtype) for x in (*inputs, out, grad)), *written]
    _call(library.topwork_attention_backward, tensors, lse, bounds, rule)
    for target, result in zip(targets, written):
        if target is not result:
            target.copy_(result)


def _call(
    function: Callable[..., int], tensors: list[Tensor], lse: Tensor, bounds: tuple[int, ...], rule: AttentionRule
) -> None:
    """The kernel sees bare memory: all tensors are `_plain`, their shapes checked; query and key come first."""
    (tokens, heads, size), key_heads = tensors[0].shape, tensors[1].shape[1]
    spans, sequences = _spans(bounds)
    kind, threads = native.KINDS[tensors[0].dtype], torch.get_num_threads()
    shape = array("q", (sequences, tokens, heads, key_heads, size, rule.window or 0, kind, threads))
    strides = array("q", [step for x in tensors for step in x.stride()[:2]])
    addresses = array("q", [x.data_ptr() for x in tensors])
    at = [table.buffer_info()[0] for table in (shape, spans, strides, addresses)]
    if function(at[0], at[1], rule.scale, at[2], at[3], lse.data_ptr()):
        raise MemoryError(f"no memory for attention over {tokens} tokens of {heads} heads")


def _plain(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype == dtype and x.device.type == "cpu" and x.stride(-1) == 1


def _by_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if _plain(x, dtype) else x.to("cpu", dtype).contiguous()


@lru_cache(maxsize=64)
def _spans(bounds: tuple[int, ...]) -> "tuple[array[int], int]":
    """(start, length) of the sequences that hold tokens, the longest first, so that threads end together; their number.
    Kept, because every layer of a pass asks for the same ones."""
    spans = [(start, stop - start) for start, stop in zip(bounds, bounds[1:]) if stop > start]
    spans.sort(key=lambda span: -span[1])
    return array("q", [x for span in spans for x in span]), len(spans)


def _varlen_runs(query: Tensor, rule: AttentionRule, sinks: Tensor | None) -> bool:
    """PyTorch's variable-length kernel wants 16 bits, Ampere or newer, and a head of at most 256 in eights."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and rule.softcap is None
        and sinks is None
        and query.dtype in (torch.bfloat16, torch.float16)
        and width <= 256
        and width % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _varlen_forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], rule: AttentionRule
) -> tuple[Tensor, Tensor]:
    """FlashAttention as torch.nn.attention.varlen calls it."""
    ends, longest = _ends(bounds, query.device)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, ends, ends, longest, longest, 0.0, rule.window is None, False, scale=rule.scale,
        **_varlen_window(rule),
    )  # fmt: skip
    return out, lse


def _varlen_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, bounds: tuple[int, ...],
    rule: AttentionRule,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    ends, longest = _ends(bounds, query.device)
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, of which there is none
    return torch.ops.aten._flash_attention_backward(
        grad.contiguous(), query, key, value, out, lse, ends, ends, longest, longest, 0.0, rule.window is None, state,
        torch.empty(0, device=query.device), scale=rule.scale, **_varlen_window(rule),
    )  # fmt: skip


def _varlen_window(rule: AttentionRule) -> dict[str, int]:
    return {"window_size_left": -1 if rule.window is None else rule.window - 1, "window_size_right": 0}


@lru_cache(maxsize=64)
def _ends(bounds: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """The bounds on the device, and the longest sequence. Kept, because every layer of a pass asks for the same."""
    ends = sent(torch.tensor(bounds, dtype=torch.int32), device)
    return ends, max(stop - start for start, stop in zip(bounds, bounds[1:]))
