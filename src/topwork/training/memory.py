"""What training takes of memory, part by part and moment by moment: the one model of it, by which runs are planned and
which `topwork plan` prints. Free of torch.

    loading   the base as it is read                        memory_held.py
    forward   what is held, and what a pass keeps           memory_layers.py
    loss      the same with a chunk of logits
    backward  the same with what going backward needs
    update    what is held, and what the optimizer needs
    saving    what is held, and a checkpoint on its way

What is held from step to step: weights and their constants, adapters, gradients, optimizer states, and the process
(`memory_process.py`). On a CPU the blocks of a pass stay too (`ops/workspace.py`).
"""

from bisect import bisect_left

from topwork.training.config import Checkpointing
from topwork.training.memory_pass import all_moments
from topwork.training.memory_setup import Member, Part, PassShape, Setup, Usage

__all__ = ["Member", "Part", "PassShape", "Setup", "Usage", "largest_pass", "moments", "peak"]


def moments(setup: Setup, shape: PassShape, checkpointed_layers: int = 0) -> list[Usage]:
    """What is held at each moment of a run, in its order."""
    return all_moments(setup, shape, checkpointed_layers)


def peak(setup: Setup, shape: PassShape, checkpointed_layers: int = 0) -> Usage:
    """The moment that takes most."""
    return max(moments(setup, shape, checkpointed_layers), key=lambda usage: usage.bytes)


LARGEST_PASS = {"cpu": 2048, "cuda": 16384}
"""Beyond these a larger pass is no faster."""
FAST_PASS = {"cpu": 512, "cuda": 4096}
"""Down to these a smaller pass is hardly slower, so that it comes before checkpointing."""
SMALLEST_PASS = 256
"""Where memory asks for less, less would not help: the weights themselves do not fit."""
MARGIN = 1.04
"""How many times what is planned a run may take at most: planned.md's runs were never under by more."""


def largest_pass(
    setup: Setup, memory_bytes: int, learned_share: float, longest: int, checkpointing: Checkpointing = "auto"
) -> tuple[int, int] | None:
    """(tokens_per_pass, checkpointed_layers) of the largest pass with which a run fits into `memory_bytes`, the
    process included; None where none does.

    Smaller passes come before checkpointing while they are as fast as large ones; only then as few layers as fit are
    checkpointed, and passes smaller still are for where even that leaves too little. A pass holds at least the
    `longest` sequence.
    """

    def fits(tokens: int, layers: int) -> bool:
        shape = PassShape(tokens, max(1, round(learned_share * tokens)), min(longest, tokens))
        return MARGIN * peak(setup, shape, layers).bytes <= memory_bytes

    def tokens(layers: int, least: int) -> int:
        budget = LARGEST_PASS[setup.device]
        while budget > max(least, SMALLEST_PASS) and not fits(max(budget, longest), layers):
            budget //= 2
        return max(budget, longest)

    every = setup.structure.checkpointable
    if checkpointing != "auto":
        layers = int({"off": 0, "full": every}.get(str(checkpointing), checkpointing))
        found = tokens(layers, 1)
        return (found, layers) if fits(found, layers) else None
    found, most = tokens(0, FAST_PASS[setup.device]), max(0, every - 1)
    fitting = min(most, bisect_left(range(most + 1), True, key=lambda layers: fits(found, layers)))
    if fitting == most:
        found = min(found, tokens(fitting, 1))
    return (found, fitting) if fits(found, fitting) else None
