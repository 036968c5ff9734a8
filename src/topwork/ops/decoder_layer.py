"""A decoder layer with the low-rank terms of its adapters as one step, forward and backward.

    q k v = norm(x) W' + b + s S B'    o = attention(rotated q, k, v)    x' = x + m (o Wo' + ...)
    x'' = x' + m feedforward(norm(x'))

What `residual_norm`, `project`, `self_attention` and `feedforward` do one after the other, in the same stages, by one
call of C each way (native/decoder.c), where a processor has AMX and all of it is C's. The way through Python between
the products of a small layer takes longer than some of them. Of a model's last layer only some rows may be wanted:
these alone go on behind its attention.
"""

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from topwork.ops.attention import NATIVE_SIZES, check_bounds, native_knows, spans_of
from topwork.ops.context import saved_empty, scratch_scope
from topwork.ops.decoder_memory import Places, Rooms, Stream, gradient_of, places_of, rooms_of, rows_of_terms, stream_of
from topwork.ops.gated import KINDS
from topwork.ops.grouped import multiplies_all
from topwork.ops.native import load as native
from topwork.ops.norm import norm_mode
from topwork.ops.packed import Packed
from topwork.ops.parts import NOT_ON_AMX, Placed, check_terms, on_amx, opened, part_lines, placed_terms, term_line
from topwork.ops.project import project
from topwork.ops.projection import Projection
from topwork.ops.prologues import Gated, RmsNorm
from topwork.ops.residual import residual_norm, residual_sum
from topwork.ops.rotary import check_tables
from topwork.ops.self_attention import HeadNorm, SelfAttention, self_attention

INPUTS = range(3, 6)
GROUPS = slice(0, 2), slice(2, 3), slice(3, 6), slice(6, 7)
"""Parts with one input: gate and up, down, the attention's inputs, its output."""
LAYER, FACTORS = struct.Struct("45q"), struct.Struct("6d")
"""As decoder.c has a layer and its factors."""
Rotary = tuple[Tensor, Tensor] | None
Functions = tuple[int, int]
"""Addresses of the attention's, forward and backward."""


@dataclass(frozen=True)
class DecoderLayer:
    """Gate, up, down, queries, keys, values and the attention's output by their frozen weights and biases, what
    adapters add to their products, and what stands between them: norms before the attention and before the feed-forward
    half, and the factor of what goes back into the stream."""

    weights: tuple[Tensor | Packed, ...]
    biases: tuple[Tensor | None, ...]
    terms: tuple[Placed, ...]
    attention: SelfAttention
    norms: tuple[RmsNorm, RmsNorm]
    kind: str
    multiplier: float

    @property
    def features(self) -> int:
        return int(self.weights[0].shape[0])

    @property
    def hidden(self) -> int:
        return int(self.weights[0].shape[1])


def at_once(x: Tensor, near: Tensor) -> bool:
    """Whether a layer of a stream x [1, T, d], with weights like `near`, may be made in one step at all."""
    return _is_stream(x) and multiplies_all(near) and on_amx() and native.compiled("attention") is not None


def decoder_layer_of(
    inputs: Sequence[Projection], output: Projection, gates: Sequence[Projection], down: Projection,
    norms: tuple[RmsNorm, RmsNorm], attention: SelfAttention, kind: str, multiplier: float,
) -> DecoderLayer | None:  # fmt: skip
    """The layer, where it may be made `at_once` and all of it is C's: else None."""
    if len(inputs) != 3 or len(gates) != 2 or not _known(attention, norms):
        return None
    groups = gates, (down,), inputs, (output,)
    if (terms := placed_terms(groups, norms[0].weight.dtype)) is None:
        return None
    layers = (*gates, down, *inputs, output)
    weights, biases = tuple(layer.weight for layer in layers), tuple(layer.bias for layer in layers)
    return DecoderLayer(weights, biases, terms, attention, norms, kind, multiplier)


def _is_stream(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_cpu and x.is_contiguous() and x.numel() > 0


def _known(attention: SelfAttention, norms: Sequence[RmsNorm]) -> bool:
    """Whether all that stands between products is C's."""
    size, of_heads = attention.heads.size, attention.norms or ()
    fits = native_knows(size, attention.rule, attention.sinks) and not attention.restores
    plain = all(x.weight.dtype in native.KINDS and x.weight.is_contiguous() for x in (*norms, *of_heads))
    return fits and plain and all(len(norm.weight) == size for norm in of_heads)


def decoder_layer(
    x: Tensor, layer: DecoderLayer, rotary: Rotary, bounds: tuple[int, ...], in_place: bool = False,
    skip_forward: bool = False, positions: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [1, T, d] to the next layer's; rotary is cos and sin [T, R] each, bounds a batch's. With `in_place` it takes
    x's place (a view's excepted), and its gradient that of the next layer's; the caller answers for it that nobody
    needs those any more. With `skip_forward` the last product is left out and what is returned means nothing: for a
    layer that runs again going backward. Of `positions` [n], each once, rows [1, n, d] alone are returned: terms of
    what comes behind the attention tell these."""
    if rotary is not None and not all(table.stride(1) == 1 for table in rotary):
        rotary = rotary[0].contiguous(), rotary[1].contiguous()
    positions = None if positions is None else positions.contiguous()
    _check(x, layer, rotary, bounds, positions)
    learned = [*(term.a for term, _ in layer.terms), *(term.b for term, _ in layer.terms)]
    in_place = in_place and positions is None and not x._is_view()
    return _DecoderLayer.apply(x, layer, rotary, bounds, in_place, skip_forward, positions, *learned)


def _check(
    x: Tensor, layer: DecoderLayer, rotary: Rotary, bounds: tuple[int, ...], positions: Tensor | None
) -> None:  # fmt: skip
    """Raises ValueError for what does not belong together: the kernel sees bare memory."""
    f, d, heads = layer.features, layer.hidden, layer.attention.heads
    own, others = heads.queries * heads.size, heads.keys * heads.size
    sizes = [(int(w.shape[0]), int(w.shape[1])) for w in layer.weights]
    expected = [(f, d), (f, d), (d, f), (own, d), (others, d), (others, d), (d, own)]
    if heads.size not in NATIVE_SIZES or heads.queries % heads.keys:
        raise ValueError(
            f"{heads.queries} heads of queries and {heads.keys} of keys, {heads.size} wide, where a multiple and a "
            "width that the kernel knows are expected"
        )
    check_bounds(bounds, bounds[-1])
    if sizes != expected or not _is_stream(x) or x.shape != (1, bounds[-1], d):
        raise ValueError(
            f"layers {sizes} for x {native.told(x)} of {bounds[-1]} rows, where {expected} and "
            f"[1, T, {d}] in fp32 are expected"
        )
    if any(len(bias) != size for bias, (size, _) in zip(layer.biases, sizes) if bias is not None):
        raise ValueError(f"biases of other lengths than layers {sizes}")
    of_heads = layer.attention.norms or ()
    if any(norm.weight.shape != (d,) for norm in layer.norms) or any(len(x.weight) != heads.size for x in of_heads):
        raise ValueError(f"norms of other widths than {d}, or of heads than {heads.size}")
    if rotary is not None:
        cos, sin = rotary
        check_tables(cos, sin, x.shape[1], heads.size, x.device, torch.bfloat16)
        if cos.stride() != sin.stride():
            raise ValueError(f"cos of strides {cos.stride()} and sin of {sin.stride()}, expected two alike")
    if positions is not None:
        known = positions.dtype == torch.int64 and positions.ndim == 1 and len(positions)
        if not known or not 0 <= int(positions.min()) <= int(positions.max()) < x.shape[1]:
            raise ValueError(f"positions are {native.told(positions)}, expected some of {x.shape[1]} rows in int64")
    rows = x.shape[1], x.shape[1] if positions is None else len(positions)
    for late in (False, True):
        check_terms((placed for placed in layer.terms if _is_late(placed) is late), sizes, rows[late])


def _is_late(placed: Placed) -> bool:
    """Whether a term belongs behind the attention."""
    return placed.part not in INPUTS


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer, rotary, bounds, in_place, skip_forward, positions, *learned):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        if in_place:
            ctx.mark_dirty(x)
        stream = Stream(x, x) if in_place else stream_of(x, positions)
        ctx.layer, ctx.rotary, ctx.bounds, ctx.in_place, ctx.is_over = layer, rotary, bounds, in_place, False
        ctx.positions = positions
        kept = run_forward(layer, stream, rotary, bounds, attention_functions(), skip_forward)
        ctx.save_for_backward(kept, *learned)  # with what learns, which torch refuses changed
        return stream.behind

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if ctx.is_over:
            raise RuntimeError("a decoder layer went backward already, and what it kept for that is overwritten")
        ctx.is_over = True
        if grad is None:
            return (None,) * (7 + 2 * len(ctx.layer.terms))
        kept, *_ = ctx.saved_tensors
        dy = grad.contiguous() if ctx.in_place else grad.clone(memory_format=torch.contiguous_format)
        dx, wants = gradient_of(dy, ctx.bounds[-1], ctx.positions), ctx.needs_input_grad[0]
        given = ctx.layer, dx, kept, ctx.rotary, ctx.bounds, attention_functions()
        all_da, all_db = run_backward(*given, wants)
        return dx.before if wants else None, *(None,) * 6, *all_da, *all_db


def run_forward(
    layer: DecoderLayer, x: Stream, rotary: Rotary, bounds: tuple[int, ...], attention: Functions, skips: bool = False
) -> Tensor:
    """Takes x through the layer (with `skips` not to its end), and gives what the backward pass needs, in one block."""
    places = _places(layer, x)
    inner, end = rows_of_terms(layer.terms, places.kept_end)
    kept = saved_empty(x.before, end, dtype=torch.uint8)
    at = kept.data_ptr()
    lines = [term_line(placed, at + s) for placed, s in zip(layer.terms, inner)]
    with scratch_scope():
        rooms = rooms_of(x.before, places, 0)
        _run(layer, x, places, at, rooms, rotary, bounds, attention, lines, goes_on=not skips)
    return kept


def run_backward(
    layer: DecoderLayer, dx: Stream, kept: Tensor, rotary: Rotary, bounds: tuple[int, ...], attention: Functions,
    wants: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """The gradients of each term's A and B; where it is wanted, the stream's before the layer takes its place."""
    places, at = _places(layer, dx), kept.data_ptr()
    inner, _ = rows_of_terms(layer.terms, places.kept_end)
    outer, slopes_end = rows_of_terms(layer.terms)
    all_da = [torch.empty_like(term.a) for term, _ in layer.terms]
    all_db = [torch.empty_like(term.b) for term, _ in layer.terms]
    with scratch_scope():
        rooms = rooms_of(dx.before, places, slopes_end)
        lines = [
            term_line(placed, at + s, rooms.slopes + g, da, db)
            for placed, s, g, da, db in zip(layer.terms, inner, outer, all_da, all_db)
        ]
        _run(layer, dx, places, at, rooms, rotary, bounds, attention, lines, back=True, goes_on=wants)
    return all_da, all_db


def _places(layer: DecoderLayer, x: Stream) -> Places:
    how, narrowed = layer.attention, x.positions is not None
    return places_of(*x.rows, narrowed, layer.hidden, layer.features, how.heads, how.norms is not None)


def _run(
    layer: DecoderLayer, x: Stream, places: Places, kept: int, rooms: Rooms, rotary: Rotary,
    bounds: tuple[int, ...], attention: Functions, lines: Sequence[bytes], back: bool = False,
    goes_on: bool = True,
) -> None:  # fmt: skip
    library = native.compiled("decoder")
    assert library is not None
    heads, rule, norms, of_heads = layer.attention.heads, layer.attention.rule, layer.norms, layer.attention.norms
    spans, sequences = spans_of(bounds)
    turns = (0, 0, 0, 0, 0)
    if rotary is not None:
        cos, sin = rotary
        turns = cos.data_ptr(), sin.data_ptr(), cos.stride(0), cos.shape[1] // 2, native.KINDS[cos.dtype]
    rows, on = x.rows
    *first, out, lse, both, q_rstd, k_rstd = (kept + place for place in places.kept)
    goes = out if x.positions is None else rooms.h
    head_norms, head_eps = (0, 0, 0, 0, 0, 0), (0.0, 0.0)
    if of_heads is not None:
        head_norms = *_addresses_and_modes(of_heads), q_rstd, k_rstd
        head_eps = of_heads[0].eps, of_heads[1].eps
    table = LAYER.pack(
        rows, layer.hidden, layer.features, KINDS.index(layer.kind),
        on, 0 if x.positions is None else x.positions.data_ptr(), *attention,
        heads.queries, heads.keys, heads.size, rule.window or 0, spans.buffer_info()[0], sequences, *turns,
        x.before.data_ptr(), x.behind.data_ptr(), *first, out, goes, lse, both, *rooms[:4],
        *_addresses_and_modes(norms), *head_norms, int(goes_on),
    )  # fmt: skip
    factors = FACTORS.pack(rule.scale, norms[0].eps, norms[1].eps, layer.multiplier, *head_eps)
    weights = [opened(layer.weights[group]) for group in GROUPS]
    parts = b"".join(line for own, group in zip(weights, GROUPS) for line in part_lines(own, layer.biases[group]))
    failed = library.topwork_decoder_layer(
        parts, table, factors, b"".join(lines), len(lines), int(back), torch.get_num_threads()
    )
    if failed == NOT_ON_AMX:
        raise NotImplementedError("the kernel of decoder layers is not made for AMX: ask `decoder_layer_of` first")
    if failed:
        raise MemoryError(f"no memory for a decoder layer of {rows} rows")


def _addresses_and_modes(norms: tuple[RmsNorm, RmsNorm] | tuple[HeadNorm, HeadNorm]) -> tuple[int, int, int, int]:
    """Of two norms of bf16."""
    weights = norms[0].weight, norms[1].weight
    modes = (norm_mode(torch.bfloat16, norm.weight, norm.unit_offset) for norm in norms)
    return weights[0].data_ptr(), weights[1].data_ptr(), *modes  # type: ignore[return-value]


def attention_functions() -> Functions:
    """attention.c's, which decoder.c calls."""
    library = native.compiled("attention")
    assert library is not None
    return _addresses(library)


@lru_cache(maxsize=4)
def _addresses(attention: ctypes.CDLL) -> Functions:
    functions = attention.topwork_attention_forward, attention.topwork_attention_backward
    forward, backward = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return forward, backward


def in_single_steps(
    layer: DecoderLayer, x: Tensor, rotary: Rotary, bounds: tuple[int, ...], positions: Tensor | None = None
) -> Tensor:
    """The truth: what other ops make of dense weights, one after the other."""
    gate, up, down, query, key, value, output = (
        Projection(weight, bias, tuple(term for term, its in layer.terms if its == part))
        for part, (weight, bias) in enumerate(zip(layer.weights, layer.biases))
    )
    dtype, multiplier = gate.weight.dtype, layer.multiplier
    total, n, prologue = residual_norm(x, layer.norms[0], dtype)
    out = self_attention(project(n, (query, key, value), prologue), rotary, bounds, layer.attention)
    if positions is not None:
        total, out = total.index_select(1, positions), out.index_select(0, positions)
    y = project(out, (output,))
    total, n, prologue = residual_norm(total, layer.norms[1], dtype, y, multiplier)
    y = project(project(n, (gate, up), prologue), (down,), Gated(layer.kind))
    return residual_sum(total, y, multiplier)
