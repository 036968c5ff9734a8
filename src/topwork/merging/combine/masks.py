"""What drops at random, as a function of the seed, the module's path and what stands in the source: of nothing else, so
that the order of sources and modules, and the number of threads, change no bit of a result."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from topwork.common.seeds import hashed
from topwork.merging.combine.entrywise import EPSILON, chances, check_density


def generator(seed: int, path: str, content: str) -> Generator:
    """Of one source's draws for one module. `content` is the hash of the source's files."""
    made = Generator()
    made.manual_seed(hashed("combine", seed, path, content, bits=63))
    return made


def at_random(deltas: Tensor, density: Sequence[float], generators: Sequence[Generator]) -> Tensor:
    """DARE's masks [n, out, in] of booleans, True for what is kept: each entry with the chance `density`."""
    check_density(density, len(deltas))
    return torch.stack([_drawn(delta, share, by) for delta, share, by in zip(deltas, density, generators)])


def by_rank(
    deltas: Tensor, density: Sequence[float], generators: Sequence[Generator], epsilon: float = EPSILON
) -> Tensor:
    """DELLA's masks [n, out, in] of booleans, True for what is kept: each entry with its chance in its row."""
    check_density(density, len(deltas))
    given = zip(deltas, density, generators)
    return torch.stack([_drawn(delta, chances(delta, share, epsilon), by) for delta, share, by in given])


def _drawn(delta: Tensor, chance: float | Tensor, by: Generator) -> Tensor:
    # PyTorch draws uniform numbers in one thread, and Bernoulli's in as many as there are
    return (torch.rand(delta.shape, generator=by) < chance).to(delta.device)
