"""How many members fit into memory together. Free of torch."""

from dataclasses import replace
from itertools import takewhile

from topwork.training.config import Checkpointing
from topwork.training.memory import SMALLEST_PASS, Setup, fits


def members_that_fit(
    setup: Setup, memory_bytes: int, asked_tokens: int | None, asked_layers: Checkpointing, longest: int = 0
) -> int:
    """How many of the first members fit together; at least 1. The pass is as asked for, else the smallest that holds
    the `longest` sequence, and checkpoints as many layers as it may."""
    every = setup.structure.checkpointable
    layers = {"off": 0, "auto": max(0, every - 1), "full": every}.get(str(asked_layers), asked_layers)
    assert isinstance(layers, int)
    tokens = asked_tokens or max(SMALLEST_PASS, longest)

    def fit(count: int) -> bool:
        first = replace(setup, members=setup.members[:count])
        return fits(first, memory_bytes, tokens, 1.0, longest or tokens, layers)

    return 1 + sum(1 for _ in takewhile(fit, range(2, len(setup.members) + 1)))
