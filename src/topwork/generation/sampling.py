"""How a next token is chosen."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from topwork.ops.host import sent


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest.

    top_k        only so many of the likeliest (0: all)
    min_p        only those at least so likely beside the likeliest
    seed         what is drawn is a function of it and of the token's place in the answer
    repetition_penalty, presence_penalty, frequency_penalty: as in transformers (prompt too) and as OpenAI's (answer)
    bias         (token, what is added to its logit)
    min_new_tokens  before so many no stop token is taken
    logprobs     how many of the likeliest are told with each token; 0 tells the token's own, None nothing
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0
    logprobs: int | None = None


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
