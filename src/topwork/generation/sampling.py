"""How a next token is chosen."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.ops.host import sent


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Sampler:
    """Chooses the tokens of sequences that run together, each by its own Sampling.

    Those of one seed draw from one generator, which goes on from token to token and begins anew once it is forgotten:
    what a sequence draws depends on who else of its seed runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generators: dict[int, torch.Generator] = {}

    def choose(self, logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
        """A token for each row of fp32 logits [B, V]: [B] int64. Rows of like Sampling are drawn in one call."""
        alike: dict[Sampling, list[int]] = {}
        for row, sampling in enumerate(samplings):
            alike.setdefault(sampling, []).append(row)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        for sampling, rows in alike.items():
            at = slice(None) if len(alike) == 1 else sent(torch.tensor(rows), logits.device)
            tokens[at] = choose(logits[at], sampling, self._generator(sampling.seed))
        return tokens

    def keep(self, seeds: Collection[int]) -> None:
        """Forget the generators of all other seeds."""
        self._generators = {seed: generator for seed, generator in self._generators.items() if seed in seeds}

    def _generator(self, seed: int) -> torch.Generator:
        if seed not in self._generators:
            self._generators[seed] = torch.Generator(self.device).manual_seed(seed)
        return self._generators[seed]


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """A token for each row of fp32 logits [B, V]: [B] int64."""
    if sampling.temperature <= 0:
        return logits.argmax(-1)
    shares = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, index = shares.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered > sampling.top_p] = 0
        shares = torch.zeros_like(shares).scatter_(-1, index, ordered)
    return torch.multinomial(shares, 1, generator=generator).squeeze(-1)
