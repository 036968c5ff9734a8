"""Attention as it is written in a book: one sequence, one head at a time, an explicit mask, float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_by_sequence(
    query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int], scale: float,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[T, H, D_v] in float64 from query [T, H, D], key [T, H_kv, D] and value [T, H_kv, D_v]."""
    group = query.shape[1] // key.shape[1]
    sequences = []
    for start, stop in zip(bounds, bounds[1:]):
        heads = [
            _one_head(
                query[start:stop, head], key[start:stop, head // group], value[start:stop, head // group],
                scale, window, softcap, None if sinks is None else sinks[head],
            )
            for head in range(query.shape[1])
        ]  # fmt: skip
        sequences.append(torch.stack(heads, 1))
    return torch.cat(sequences)


def _one_head(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None,
    sink: Tensor | None,
) -> Tensor:  # fmt: skip
    scores = query.double() @ key.double().T * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    back = torch.arange(len(query))[:, None] - torch.arange(len(key))[None]
    seen = (back >= 0) if window is None else (back >= 0) & (back < window)
    weights = torch.where(seen, torch.exp(scores), 0.0)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink.double())
    return weights / total @ value.double()
