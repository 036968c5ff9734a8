"""What a running batch keeps of the tokens that it has read: keys and values."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from topwork.ops.attention import flat_attention
from topwork.ops.attention_reference import AttentionRule, attend
from topwork.ops.host import sent

CACHE_GROWTH = 64
"""Cache slots are added in steps of so many tokens."""


class KeyValueCache:
    """Keys and values of B running sequences, per attention module: [B, H_kv, capacity, D]; `lengths` [B] of each are
    held."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = sent(torch.tensor(lengths), device)
        self._on_host = list(lengths)  # to ask a GPU for the longest would be to wait, in every layer
        self.reading: tuple[tuple[int, ...], int] | None = None  # (bounds, first row) while prompts are read
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._capacity = _rounded(max(lengths) + 1)

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, sinks: Tensor | None
    ) -> Tensor:
        """Attention [n, H, D] of n new tokens (q [n, H, D], k and v [n, H_kv, D]) with what is kept and themselves."""
        keys, values = self._room(module, k, v)
        if self.reading is not None:
            bounds, first = self.reading
            for row, (start, stop) in enumerate(zip(bounds, bounds[1:]), first):
                keys[row, :, : stop - start] = k[start:stop].transpose(0, 1)
                values[row, :, : stop - start] = v[start:stop].transpose(0, 1)
            return flat_attention(q, k, v, bounds, rule, sinks)
        rows = torch.arange(len(self.lengths), device=q.device)
        keys[rows, :, self.lengths], values[rows, :, self.lengths] = k, v
        longest = max(self._on_host) + 1
        at = torch.arange(longest, device=q.device)[None]
        seen = at <= self.lengths[:, None]
        if rule.window is not None:
            seen &= at > self.lengths[:, None] - rule.window
        out = attend(q[:, :, None], keys[:, :, :longest], values[:, :, :longest], seen[:, None, None], rule, sinks)
        return out[:, :, 0]

    def advance(self) -> None:
        """Every sequence is a token longer."""
        self.lengths = self.lengths + 1
        self._on_host = [length + 1 for length in self._on_host]

    def keep(self, rows: Sequence[int]) -> None:
        """Only these sequences go on."""
        at = sent(torch.tensor(rows), self.lengths.device)
        self.lengths, self._on_host = self.lengths[at], [self._on_host[row] for row in rows]
        self._kept = {module: (keys[at], values[at]) for module, (keys, values) in self._kept.items()}

    def _room(self, module: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if module not in self._kept:
            sizes = [(len(self.lengths), x.shape[1], self._capacity, x.shape[2]) for x in (k, v)]
            self._kept[module] = k.new_zeros(sizes[0]), v.new_zeros(sizes[1])
        keys, values = self._kept[module]
        needed = max(self._on_host) + 1
        if needed > keys.shape[2]:
            grown = _rounded(needed) - keys.shape[2]
            keys, values = (nn.functional.pad(x, (0, 0, 0, grown)) for x in (keys, values))
            self._kept[module] = keys, values
        return keys, values


def _rounded(tokens: int) -> int:
    return -(-tokens // CACHE_GROWTH) * CACHE_GROWTH
