"""Causal attention over a flat batch: each sequence attends to itself alone.

On CPUs a C kernel (native/attention.c) runs forward and backward in bf16 and fp32, on GPUs the best of those that are
there: flash-attn, PyTorch's own FlashAttention, ours in Triton (varlen.py). What none of them knows goes to plain torch
(attention_reference.py), which is also the truth: on a CPU soft-capping and sinks, on a GPU heads beyond 256 values.
`attention_kernel` tells which it is. `flat_attention` is the differentiable entry; `attention_forward` and
`attention_backward` are the same without autograd, for callers that write their own backward.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from topwork.ops.attention_reference import AttentionRule, backward_reference, forward_reference
from topwork.ops.context import saved_empty
from topwork.ops.native import load as native
from topwork.ops.varlen import Inputs, chosen

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
    inputs = Inputs(query, key, value, bounds, rule, sinks)
    if kernel := chosen(inputs):
        return kernel.forward(inputs)
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
    targets = into or _empty(query, key, value)
    if lse is not None and (library := _native(query, key, value, rule, sinks)):
        _native_backward(library, grad, (query, key, value), out, lse, bounds, rule, targets)
        return *targets, None
    inputs = Inputs(query, key, value, bounds, rule, sinks)
    if lse is not None and (kernel := chosen(inputs)):
        sink_grad = kernel.backward(inputs, grad, out, lse, targets)
    else:
        sink_grad = backward_reference(grad, query, key, value, out, bounds, rule, sinks, targets)
    return *targets, sink_grad


def attention_kernel(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], rule: AttentionRule, sinks: Tensor | None = None
) -> str:
    """What `attention_forward` would run on: "C", "flash-attn", "torch", "triton" or "plain torch". On a GPU the
    environment variable TOPWORK_ATTENTION names one of the middle three to be taken; ValueError where it cannot."""
    if _native(query, key, value, rule, sinks):
        return "C"
    kernel = chosen(Inputs(query, key, value, bounds, rule, sinks))
    return kernel.name if kernel else "plain torch"


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
    check_bounds(bounds, tokens)
    if key.shape[0] != tokens or value.shape[:2] != key.shape[:2] or key.shape[2] != query.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value of {shapes} do not fit: [T, H, D], [T, H_kv, D], [T, H_kv, D]")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads are no multiple of {key.shape[1]} key heads")


def check_bounds(bounds: tuple[int, ...], tokens: int) -> None:
    """Raises ValueError where sequences do not follow one another through a batch: a kernel sees bare memory."""
    if bounds[:1] != (0,) or bounds[-1] != tokens or any(b < a for a, b in zip(bounds, bounds[1:])):
        raise ValueError(f"bounds {bounds} do not cover a batch of {tokens} tokens from 0 on, rising")


def _check_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, into: Sequence[Tensor] | None
) -> None:
    shape = *query.shape[:2], value.shape[2]
    expected = [shape, shape, query.shape, key.shape, value.shape]
    found = [x.shape for x in (grad, out, *(into or (query, key, value)))]
    if found != expected:
        given, wanted = ([tuple(x) for x in shapes] for shapes in (found, expected))
        raise ValueError(f"grad, out and gradients of shapes {given}, where {wanted} are expected")


def _native(query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule, sinks: Tensor | None) -> ctypes.CDLL | None:
    """The C kernel, where it knows this case."""
    size = query.shape[-1]
    known = (
        query.device == key.device == value.device
        and query.dtype == key.dtype == value.dtype
        and value.shape[-1] == size
        and native_knows(size, rule, sinks)
    )
    return native.kernels("attention", query) if known else None


def native_knows(size: int, rule: AttentionRule, sinks: Tensor | None) -> bool:
    """Whether the C kernel is made for heads of this width and all that is asked of them."""
    plain = rule.softcap is None and sinks is None and rule.scale > 0
    return size in NATIVE_SIZES and plain and (rule.window is None or rule.window > 0)


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
    spans, sequences = spans_of(bounds)
    kind, threads = native.KINDS[tensors[0].dtype], torch.get_num_threads()
    shape = array("q", (sequences, tokens, heads, key_heads, size, rule.window or 0, kind, threads))
    strides = array("q", [step for x in tensors for step in x.stride()[:2]])
    addresses = array("q", [x.data_ptr() for x in tensors])
    at = [table.buffer_info()[0] for table in (shape, spans, strides, addresses)]
    if function(at[0], at[1], rule.scale, at[2], at[3], lse.data_ptr()):
        raise MemoryError(f"no memory for attention over {tokens} tokens of {heads} heads")


def _plain(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype == dtype and x.is_cpu and x.stride(-1) == 1


def _by_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if _plain(x, dtype) else x.to("cpu", dtype).contiguous()


@lru_cache(maxsize=64)
def spans_of(bounds: tuple[int, ...]) -> "tuple[array[int], int]":
    """(start, length) of the sequences that hold tokens, the longest first, so that threads end together; their number.
    Kept, because every layer of a pass asks for the same ones."""
    spans = [(start, stop - start) for start, stop in zip(bounds, bounds[1:]) if stop > start]
    spans.sort(key=lambda span: -span[1])
    return array("q", [x for span in spans for x in span]), len(spans)
