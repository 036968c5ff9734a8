"""Attention of a flat batch in plain torch: the truth, and what runs where no kernel does.

Sequences of like length are gathered into one batch, so that thirty short rows cost a few calls and not thirty. A
gathered sequence that is shorter than its group is continued with copies of its last token: causal attention never
looks ahead, so the copies change nothing, and their results are dropped.

The forward pass uses PyTorch's fused kernel where that computes the rule asked for. The backward pass is matrix
products over blocks of query rows with the softmax computed again: it knows windows, soft-capping and sinks.

    s = scale * q k'        s = cap * tanh(s / cap) where capped        p = softmax over keys j with i - window < j <= i
    out = p v               with sinks: one more logit per head in the softmax's denominator, whose value is zero
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SCORES_PER_BLOCK = 1 << 22
"""Scores held at once while going backward; 16 MiB in fp32, which stays in cache on most CPUs."""


@dataclass(frozen=True)
class AttentionRule:
    """How scores are made: multiplied by `scale`, capped, and kept for the last `window` keys only."""

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class _Group:
    """Sequences gathered into [S, L]; `index` is None where they already stand so in the batch."""

    start: int
    sequences: int
    length: int
    index: Tensor | None  # [S * L] batch positions, tails continued with the last token's
    kept: Tensor | None  # positions in [S * L] that are real, where some are not
    places: Tensor | None  # their batch positions


def forward_reference(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], rule: AttentionRule, sinks: Tensor | None = None
) -> Tensor:
    """[T, H, D_v] of query [T, H, D], key [T, H_kv, D] and value [T, H_kv, D_v]."""
    out = value.new_empty(*query.shape[:2], value.shape[-1])
    for group in _groups(bounds, query.device):
        q, k, v = (_gather(x, group) for x in (query, key, value))
        _scatter(_forward(q, k, v, rule, sinks), group, out)
    return out


def backward_reference(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, bounds: tuple[int, ...], rule: AttentionRule,
    sinks: Tensor | None, into: Sequence[Tensor],
) -> Tensor | None:  # fmt: skip
    """Writes the gradients of query, key and value into the three tensors of `into`; returns that of the sinks."""
    sink_grad = torch.zeros_like(sinks, dtype=torch.float32) if sinks is not None else None
    for group in _groups(bounds, query.device):
        q, k, v, o = (_gather(x, group) for x in (query, key, value, out))
        results = _backward(q, k, v, o, _gather(grad, group, real_only=True), rule, sinks, sink_grad)
        for result, target in zip(results, into):
            _scatter(result, group, target)
    return None if sink_grad is None or sinks is None else sink_grad.to(sinks.dtype)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rule: AttentionRule, sinks: Tensor | None
) -> Tensor:
    """Attention with an explicit mask, without gradients: query [S, H, L, D], key and value [S, H_kv, K, D], mask
    (True where seen) broadcastable to [S, 1, L, K]. Returns [S, H, L, D]."""
    if rule.softcap is None and sinks is None:
        if not query.is_cpu:
            return attend_by_rows(query, key, value, mask, rule.scale)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=rule.scale, enable_gqa=True)
    grouped, keys = _by_key_head(query, key), key.unsqueeze(2)
    scores = _capped(torch.matmul(grouped, keys.transpose(-1, -2)).float() * rule.scale, rule.softcap)
    shares, _ = _shares(scores.masked_fill(~mask.unsqueeze(2), -torch.inf), _sinks_by_key_head(sinks, key.shape[1]))
    return torch.matmul(shares.to(query.dtype), value.unsqueeze(2)).flatten(1, 2)


def attend_by_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`attend` by torch's kernels for a GPU. Query heads of one key head are its rows: a kernel that takes a mask may
    know no fewer heads of keys, which would then be copied in fp32. cuDNN's, the first on Hopper, is left out: it plans
    anew, for tens of milliseconds, wherever K is another, which it is with every token."""
    rows = _by_key_head(query, key)
    seen = mask.unsqueeze(2).expand(-1, -1, *rows.shape[2:4], -1).flatten(2, 3)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        out = F.scaled_dot_product_attention(rows.flatten(2, 3), key, value, attn_mask=seen, scale=scale)
    return out.unflatten(2, rows.shape[2:4]).flatten(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, sinks: Tensor | None) -> Tensor:
    """[S, H, L, D] from q [S, H, L, D] and k, v [S, H_kv, L, D]."""
    length = q.shape[2]
    if rule.softcap is None and sinks is None and (rule.window is None or rule.window >= length):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=rule.scale, enable_gqa=True)
    out = torch.empty_like(q)
    for rows, keys in _blocks(q, rule):
        shares, _, _ = _block_shares(q, k, rows, keys, rule, sinks)
        out[:, :, rows] = torch.matmul(shares.to(q.dtype), v[:, :, None, keys]).flatten(1, 2)
    return out


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, rule: AttentionRule, sinks: Tensor | None,
    sink_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v; adds the sinks' to `sink_grad`."""
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    overlap = (grad.float() * out.float()).sum(-1, keepdim=True)  # [S, H, L, 1]: p . dp, the softmax's own term
    for rows, keys in _blocks(q, rule):
        shares, capped, sunk = _block_shares(q, k, rows, keys, rule, sinks)  # [S, H_kv, G, R, K]
        g = _by_key_head(grad[:, :, rows], k)
        half = shares.to(q.dtype)
        dv[:, :, keys] += _over_query_heads(half, g)
        dscores = torch.matmul(g, v[:, :, None, keys].transpose(-1, -2)).float()
        dscores.sub_(_by_key_head(overlap[:, :, rows], k)).mul_(shares)
        if rule.softcap is not None:
            dscores.mul_(1 - (capped / rule.softcap) ** 2)
        dscores = dscores.mul_(rule.scale).to(q.dtype)
        dq[:, :, rows] = torch.matmul(dscores, k[:, :, None, keys]).flatten(1, 2)
        dk[:, :, keys] += _over_query_heads(dscores, _by_key_head(q[:, :, rows], k))
        if sink_grad is not None and sunk is not None:
            sink_grad -= (sunk * _by_key_head(overlap[:, :, rows], k)).sum((0, 3, 4)).flatten()
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _block_shares(
    q: Tensor, k: Tensor, rows: slice, keys: slice, rule: AttentionRule, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(softmax, capped scores, the sinks' share) of some query rows: fp32 [S, H_kv, G, R, K], the last with K = 1."""
    scores = torch.matmul(_by_key_head(q[:, :, rows], k), k[:, :, None, keys].transpose(-1, -2)).float()
    capped = _capped(scores.mul_(rule.scale), rule.softcap)
    i = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=q.device)
    unseen = j > i
    if rule.window is not None:
        unseen |= j <= i - rule.window
    masked = capped.masked_fill(unseen, -torch.inf)
    shares, sunk = _shares(masked, _sinks_by_key_head(sinks, k.shape[1]))
    return shares, capped, sunk


def _shares(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if sinks is None:
        return torch.softmax(scores, -1), None
    logits = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
    shares = torch.softmax(logits, -1)
    return shares[..., :-1], shares[..., -1:]


def _capped(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else torch.tanh(scores / cap) * cap


def _sinks_by_key_head(sinks: Tensor | None, key_heads: int) -> Tensor | None:
    return None if sinks is None else sinks.float().reshape(1, key_heads, -1, 1, 1)


def _by_key_head(x: Tensor, k: Tensor) -> Tensor:
    """[S, H, R, D] -> [S, H_kv, G, R, D]: the query heads that share a key head, side by side."""
    return x.unflatten(1, (k.shape[1], -1))


def _over_query_heads(weights: Tensor, x: Tensor) -> Tensor:
    """sum over the G query heads and R rows: [S, H_kv, G, R, K]' [S, H_kv, G, R, D] -> [S, H_kv, K, D]."""
    return torch.matmul(weights.flatten(2, 3).transpose(-1, -2), x.flatten(2, 3))


def _blocks(q: Tensor, rule: AttentionRule) -> Iterator[tuple[slice, slice]]:
    """Query rows in blocks of at most SCORES_PER_BLOCK scores, each with the keys that it can see."""
    sequences, heads, length, _ = q.shape
    rows = max(1, min(length, SCORES_PER_BLOCK // (sequences * heads * length)))
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        first = 0 if rule.window is None else max(0, start - rule.window + 1)
        yield slice(start, stop), slice(first, stop)


@lru_cache(maxsize=64)
def _groups(bounds: tuple[int, ...], device: torch.device) -> tuple[_Group, ...]:
    """Sequences by falling length, a group as long as the padding stays under a fifth of it. Kept, because every layer
    of a pass asks for the same ones."""
    spans = sorted(
        ((stop - start, start) for start, stop in zip(bounds, bounds[1:]) if stop > start),
        key=lambda span: (-span[0], span[1]),
    )
    groups, at = [], 0
    while at < len(spans):
        longest = spans[at][0]
        end = at
        while end < len(spans) and spans[end][0] >= 0.8 * longest - 4:
            end += 1
        groups.append(_group(spans[at:end], longest, device))
        at = end
    return tuple(groups)


def _group(spans: list[tuple[int, int]], longest: int, device: torch.device) -> _Group:
    if len(spans) == 1:
        return _Group(spans[0][1], 1, longest, None, None, None)
    lengths = torch.tensor([length for length, _ in spans])[:, None]
    starts = torch.tensor([start for _, start in spans])[:, None]
    steps = torch.arange(longest)[None]
    index = starts + torch.minimum(steps, lengths - 1)
    real = steps < lengths
    kept = real.flatten().nonzero().flatten()
    places = index.flatten()[kept]
    whole = bool(real.all())
    return _Group(
        0, len(spans), longest, index.flatten().to(device), None if whole else kept.to(device), places.to(device)
    )


def _gather(x: Tensor, group: _Group, real_only: bool = False) -> Tensor:
    """[T, H, D] -> [S, H, L, D]; with `real_only` the tails are zero (a gradient must not be counted twice)."""
    if group.index is None:
        return x[group.start : group.start + group.length].transpose(0, 1)[None]
    if real_only and group.kept is not None:
        flat = x.new_zeros(group.sequences * group.length, *x.shape[1:])
        flat[group.kept] = x[group.places]
    else:
        flat = x[group.index]
    return flat.unflatten(0, (group.sequences, group.length)).transpose(1, 2)


def _scatter(result: Tensor, group: _Group, out: Tensor) -> None:
    """[S, H, L, D] to its places in out [T, H, D]."""
    if group.index is None:
        out[group.start : group.start + group.length] = result[0].transpose(0, 1)
        return
    flat = result.transpose(1, 2).flatten(0, 1)
    out[group.places] = flat if group.kept is None else flat[group.kept]
