"""Generation over flat batches: prompts are read in one batch, then every sequence goes on by one token a pass.

Sequences may belong to different adapters, or to none. Finished ones leave the batch, so no work is spent on them.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from topwork.common.errors import RequestError
from topwork.models.base import Base
from topwork.models.held import held_for_inference
from topwork.ops.attention import flat_attention
from topwork.ops.attention_reference import AttentionRule, attend
from topwork.ops.batch import Batch, Segment
from topwork.ops.context import PassContext

PROMPT_TOKENS_PER_PASS = 4096
CACHE_GROWTH = 64
"""Cache slots are added in steps of so many tokens."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class KeyValueCache:
    """Keys and values of B running sequences, per attention module: [B, H_kv, capacity, D]."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = torch.tensor(lengths, device=device)
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
        longest = int(self.lengths.max()) + 1
        at = torch.arange(longest, device=q.device)[None]
        seen = at <= self.lengths[:, None]
        if rule.window is not None:
            seen &= at > self.lengths[:, None] - rule.window
        out = attend(q[:, :, None], keys[:, :, :longest], values[:, :, :longest], seen[:, None, None], rule, sinks)
        return out[:, :, 0]

    def keep(self, rows: Tensor) -> None:
        """Only these sequences go on."""
        self.lengths = self.lengths[rows]
        self._kept = {module: (keys[rows], values[rows]) for module, (keys, values) in self._kept.items()}

    def _room(self, module: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if module not in self._kept:
            sizes = [(len(self.lengths), x.shape[1], self._capacity, x.shape[2]) for x in (k, v)]
            self._kept[module] = k.new_zeros(sizes[0]), v.new_zeros(sizes[1])
        keys, values = self._kept[module]
        needed = int(self.lengths.max()) + 1
        if needed > keys.shape[2]:
            grown = _rounded(needed) - keys.shape[2]
            keys, values = (nn.functional.pad(x, (0, 0, 0, grown)) for x in (keys, values))
            self._kept[module] = keys, values
        return keys, values


@torch.no_grad()
def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str | None],
    stop_ids: Collection[int],
    sampling: Sampling = Sampling(),
    batch_size: int = 64,
    on_finished: Callable[[int], None] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, without the stop token that ended it.

    adapters: one name (or None for the bare base) per prompt. `on_finished(count)` is told how many sequences came to
    their end, `on_token(prompt's index, token)` every token as it comes. Raises RequestError for an empty prompt and
    for one that leaves no room in the model's context.
    """
    for index, prompt in enumerate(prompts):
        room = _room(base, adapters[index])
        if not 0 < len(prompt) < room:
            raise RequestError(
                f"prompt {index} has {len(prompt)} tokens; the context of {base.name} is {room}"
                f"{' without virtual tokens' if room < base.context_length else ''}, and a prompt must be shorter and "
                "not empty"
            )
    # like lengths and like adapters together: less spread in the cache, fewer segments
    order = sorted(range(len(prompts)), key=lambda i: (adapters[i] or "", len(prompts[i]), i))
    results: list[list[int]] = [[] for _ in prompts]
    generator = torch.Generator(base.device).manual_seed(sampling.seed)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        with held_for_inference(base.module):
            _run_batch(
                base, batch, prompts, adapters, set(stop_ids), sampling, generator, results, on_finished, on_token
            )
    return results


def _run_batch(
    base: Base, batch: list[int], prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], stop_ids: set[int],
    sampling: Sampling, generator: torch.Generator, results: list[list[int]],
    on_finished: Callable[[int], None] | None, on_token: Callable[[int, int], None] | None,
) -> None:  # fmt: skip
    cache = KeyValueCache([len(prompts[i]) + base.virtual_tokens(adapters[i]) for i in batch], base.device)
    logits = _read_prompts(base, [prompts[i] for i in batch], [adapters[i] for i in batch], cache)
    for step in range(sampling.max_new_tokens):
        tokens = _choose(logits, sampling, generator)
        going = []
        for row, (index, token) in enumerate(zip(batch, tokens.tolist())):
            if token in stop_ids:
                continue
            results[index].append(token)
            if on_token is not None:
                on_token(index, token)
            full = len(prompts[index]) + step + 1 >= _room(base, adapters[index])
            if step + 1 < sampling.max_new_tokens and not full:
                going.append(row)
        if on_finished is not None and len(going) < len(batch):
            on_finished(len(batch) - len(going))
        if not going:
            return
        if len(going) < len(batch):
            rows = torch.tensor(going, device=base.device)
            cache.keep(rows)
            tokens, batch = tokens[rows], [batch[row] for row in going]
        logits = _one_token(base, tokens, [adapters[i] for i in batch], cache)


def _read_prompts(base: Base, prompts: list[Sequence[int]], adapters: list[str | None], cache: KeyValueCache) -> Tensor:
    """Fill the cache; the logits [B, V] after each prompt's last token."""
    logits, first = [], 0
    while first < len(prompts):
        last, total = first + 1, len(prompts[first])
        while last < len(prompts) and total + len(prompts[last]) <= PROMPT_TOKENS_PER_PASS:
            total += len(prompts[last])
            last += 1
        lengths = [len(prompt) for prompt in prompts[first:last]]
        tokens = torch.tensor([token for prompt in prompts[first:last] for token in prompt], device=base.device)
        positions = torch.cat([torch.arange(length, device=base.device) for length in lengths])
        context = base.pass_over(_batch(tokens, positions, lengths, adapters[first:last]))
        assert context.batch is not None
        ends = torch.tensor(context.batch.cu_seqlens[1:], device=base.device) - 1
        cache.reading = (context.batch.cu_seqlens, first)
        hidden = base.run(replace(context, cache=cache, given_rows=None))
        logits.append(base.logits_of(context.batch, hidden, ends))
        first = last
    cache.reading = None
    return torch.cat(logits)


def _room(base: Base, adapter: str | None) -> int:
    """Positions of the context that are left for text."""
    return base.context_length - base.virtual_tokens(adapter)


def _one_token(base: Base, tokens: Tensor, adapters: list[str | None], cache: KeyValueCache) -> Tensor:
    batch = _batch(tokens, cache.lengths, [1] * len(tokens), adapters)
    hidden = base.run(PassContext(batch, cache=cache))
    logits = base.logits_of(batch, hidden, torch.arange(len(tokens), device=base.device))
    cache.lengths = cache.lengths + 1
    return logits


def _batch(tokens: Tensor, positions: Tensor, lengths: list[int], adapters: list[str | None]) -> Batch:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    segments, row = [], 0
    for adapter, members in groupby(adapters):
        count = len(list(members))
        segments.append(Segment(bounds[row], bounds[row + count], adapter))
        row += count
    return Batch(tokens, positions, tuple(bounds), tuple(segments))


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    if sampling.temperature <= 0:
        return logits.argmax(-1)
    shares = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, index = shares.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered > sampling.top_p] = 0
        shares = torch.zeros_like(shares).scatter_(-1, index, ordered)
    return torch.multinomial(shares, 1, generator=generator).squeeze(-1)


def _rounded(tokens: int) -> int:
    return -(-tokens // CACHE_GROWTH) * CACHE_GROWTH
