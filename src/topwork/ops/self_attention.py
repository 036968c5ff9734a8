"""From one buffer of queries, keys and values to the attention's output: norm of heads, rotary positions, attention.

One autograd Function that keeps the buffer, the output and a few numbers a row. Rotating happens in the buffer itself;
where heads are normalised first (Qwen 3, Gemma 3), the buffer stays as it is and rotated copies are made again going
backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.ops.attention import attention_backward, attention_forward
from topwork.ops.attention_reference import AttentionRule
from topwork.ops.context import Prefix, handoff_empty
from topwork.ops.norm import rms_norm, rms_norm_backward, rms_normalized
from topwork.ops.rotary import rotate_


@dataclass(frozen=True)
class HeadNorm:
    """RMS norm of each head's values, or of all heads' together, as the weight's length says."""

    weight: Tensor
    eps: float
    unit_offset: bool


@dataclass(frozen=True)
class Heads:
    """How a row of the buffer is divided: heads of queries, of keys and as many of values, each `size` wide."""

    queries: int
    keys: int
    size: int

    @property
    def width(self) -> int:
        """Values in a row."""
        return (self.queries + 2 * self.keys) * self.size

    def parts(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, width] -> views q [T, H, D], k and v [T, H_kv, D]."""
        sizes = [self.queries, self.keys, self.keys]
        q, k, v = self._heads(buffer).split_with_sizes(sizes, 1)
        return q, k, v

    def turned(self, buffer: Tensor) -> Tensor:
        """[T, width] -> view [T, H + H_kv, D] of queries and keys, which rotary positions turn at once."""
        return self._heads(buffer)[:, : self.queries + self.keys]

    def _heads(self, buffer: Tensor) -> Tensor:
        return buffer.view(buffer.shape[0], -1, self.size)


@dataclass(frozen=True)
class SelfAttention:
    """What a layer does between its first and its last projection. Norms, rotary positions and sinks are optional.

    `restores` rotates the buffer back at the end of the backward pass, where what made it looks at it again (gains):
    `ops/project.py` keeps its output for them and does not save it, since autograd would refuse one that was rotated in
    place. Rotated copies would leave the buffer alone, for another pass over queries and keys each way and other bits
    of DoRA's gradients.
    """

    heads: Heads
    rule: AttentionRule
    norms: tuple[HeadNorm, HeadNorm] | None = None
    sinks: Tensor | None = None
    restores: bool = False


def self_attention(
    buffer: Tensor, rotary: tuple[Tensor, Tensor] | None, bounds: tuple[int, ...], how: SelfAttention,
    prefixes: Sequence[Prefix] = (),
) -> Tensor:  # fmt: skip
    """[T, width] -> [T, H * D]. `buffer` is overwritten; rotary is cos and sin [T, R] each, bounds a batch's."""
    rows, tables = [at for at, _ in prefixes], [table for _, table in prefixes]
    return _SelfAttention.apply(buffer, rotary, bounds, how, rows, *tables)


def rotated_parts(
    buffer: Tensor, rotary: tuple[Tensor, Tensor] | None, how: SelfAttention, prefixes: Sequence[Prefix] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the attention takes them, without a gradient; `buffer` may be overwritten."""
    parts, _ = _prepared(buffer, rotary, how)
    _put(parts, prefixes)
    return parts


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, buffer, rotary, bounds, how, rows, *tables):  # type: ignore[no-untyped-def]
        (q, k, v), rstds = _prepared(buffer, rotary, how)
        _put((q, k, v), list(zip(rows, tables)))
        out, lse = attention_forward(q, k, v, bounds, how.rule, how.sinks)
        ctx.rotary, ctx.bounds, ctx.how, ctx.rows = rotary, bounds, how, rows
        ctx.save_for_backward(buffer, out, lse, *tables, *rstds)
        return out.flatten(1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        buffer, out, lse, *others = ctx.saved_tensors
        how, rotary = ctx.how, ctx.rotary
        tables, rstds = others[: len(ctx.rows)], others[len(ctx.rows) :]
        q, k, v = how.heads.parts(buffer)
        if how.norms is not None:
            q, k = (_normed_again(x, norm, rstd) for x, norm, rstd in zip((q, k), how.norms, rstds))
            _rotate((q, k), rotary)
            _put((q, k, v), list(zip(ctx.rows, tables)))
        dbuffer = handoff_empty(buffer, *buffer.shape)
        into = how.heads.parts(dbuffer)
        attention_backward(grad.view_as(out), q, k, v, out, lse, ctx.bounds, how.rule, how.sinks, into)
        dtables = [_taken(into, rows, table) for rows, table in zip(ctx.rows, tables)]
        _rotate((how.heads.turned(dbuffer),), rotary, inverse=True)
        if how.norms is not None:
            for dx, x, norm, rstd in zip(into, how.heads.parts(buffer), how.norms, rstds):
                dx.copy_(_norm_backward(dx, x, norm, rstd))
        elif how.restores:
            _rotate((how.heads.turned(buffer),), rotary, inverse=True)
        return dbuffer, None, None, None, None, *dtables


def _prepared(
    buffer: Tensor, rotary: tuple[Tensor, Tensor] | None, how: SelfAttention
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """(q, k, v) normalised and rotated (in the buffer itself where there are no norms), and the norms' rstd."""
    q, k, v = how.heads.parts(buffer)
    if how.norms is None:
        _rotate((how.heads.turned(buffer),), rotary)
        return (q, k, v), ()
    (q, q_rstd), (k, k_rstd) = (_normed(x, norm) for x, norm in zip((q, k), how.norms))
    _rotate((q, k), rotary)
    return (q, k, v), (q_rstd, k_rstd)


def _put(parts: tuple[Tensor, Tensor, Tensor], prefixes: Sequence[Prefix]) -> None:
    """Write learned keys and values in their places."""
    for rows, table in prefixes:
        for x, learned in zip(parts[1:], table):
            x[rows] = learned.to(x.dtype).repeat(len(rows) // len(learned), 1, 1)


def _taken(gradients: Sequence[Tensor], rows: Tensor, table: Tensor) -> Tensor:
    """The gradient of learned keys and values [2, P, H_kv, D], summed in fp32; of the rows they stand in, none is
    left."""
    count = table.shape[1]
    taken = torch.stack([dx[rows].float().unflatten(0, (-1, count)).sum(0) for dx in gradients[1:]])
    for dx in gradients[1:]:
        dx.index_fill_(0, rows, 0)  # not dx[rows] = 0: the number would be sent to a GPU, and waited for
    return taken.to(table)


def _rotate(parts: Sequence[Tensor], rotary: tuple[Tensor, Tensor] | None, inverse: bool = False) -> None:
    if rotary is not None:
        cos, sin = rotary
        for x in parts:
            rotate_(x, cos, sin, inverse)


def _rows(x: Tensor, norm: HeadNorm) -> Tensor:
    """[T, H, D], or [T, H * D] where the norm goes over all heads together."""
    return x if norm.weight.numel() == x.shape[-1] else x.flatten(1)


def _normed(x: Tensor, norm: HeadNorm) -> tuple[Tensor, Tensor]:
    y, rstd = rms_norm(_rows(x, norm), norm.weight, norm.eps, norm.unit_offset)
    return y.view(x.shape), rstd


def _normed_again(x: Tensor, norm: HeadNorm, rstd: Tensor) -> Tensor:
    return rms_normalized(_rows(x, norm), norm.weight, rstd, norm.unit_offset).view(x.shape)


def _norm_backward(dx: Tensor, x: Tensor, norm: HeadNorm, rstd: Tensor) -> Tensor:
    rows = _rows(dx, norm)
    return rms_norm_backward(rows, _rows(x, norm), norm.weight, rstd, norm.unit_offset).view(x.shape)
